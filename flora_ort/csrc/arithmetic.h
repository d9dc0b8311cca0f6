// The arithmetic of one thread, compiled for the CPU and for the GPU: what indexes wrongly does so on both.
//
// Numbers are read in their dtype, accumulated in float32 and cast once. A thread computes TM rows by VEC neighbouring
// columns; it reads VEC numbers of a row at once, and KV of z. plan.h sees to it that they are aligned.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FLORA_FN __device__ __forceinline__
#define FLORA_UNROLL _Pragma("unroll")
#else
#define FLORA_FN inline __attribute__((always_inline))
#define FLORA_UNROLL
#endif

#ifndef FLORA_SPACE  // one for each set of instructions that this is compiled with
#define FLORA_SPACE portable
#endif

namespace flora {
namespace FLORA_SPACE {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

FLORA_FN float widen(float x) { return x; }

#if defined(__CUDACC__)
FLORA_FN float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FLORA_FN float widen(BFloat x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
FLORA_FN void narrow(float x, float* to) { *to = x; }
FLORA_FN void narrow(float x, Half* to) { to->bits = __half_as_ushort(__float2half_rn(x)); }
FLORA_FN void narrow(float x, BFloat* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
FLORA_FN float widen(Half x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
FLORA_FN float widen(BFloat x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
FLORA_FN void narrow(float x, float* to) { *to = x; }
FLORA_FN void narrow(float x, Half* to) {
  _Float16 value = static_cast<_Float16>(x);
  std::memcpy(to, &value, sizeof value);
}
FLORA_FN void narrow(float x, BFloat* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = x != x;
  bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
  to->bits = nan ? 0x7fc0 : static_cast<uint16_t>(bits >> 16);
}
#endif

#if defined(__CUDACC__)
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Neighbouring numbers as they were read.
template <typename T, int N>
struct Raw {
  using W = typename Word<sizeof(T) * N>::type;
  W word;

  FLORA_FN void read(const T* from) { word = __ldg(reinterpret_cast<const W*>(from)); }
  FLORA_FN void read_fresh(const T* from) { word = __ldcg(reinterpret_cast<const W*>(from)); }
  // They are not made wider before this: twice as many registers would hold them.
  FLORA_FN Raw settled() const {
    Raw copy = *this;
    if constexpr (sizeof(W) == 16)
      asm volatile("" : "+r"(copy.word.x), "+r"(copy.word.y), "+r"(copy.word.z), "+r"(copy.word.w));
    return copy;
  }
  FLORA_FN void widen_to(float (&to)[N]) const {
    T items[N];
    memcpy(items, &word, sizeof word);
    FLORA_UNROLL
    for (int i = 0; i < N; ++i) to[i] = widen(items[i]);
  }
};
template <typename T, int N>
FLORA_FN void store(const float (&from)[N], T* to) {
  using W = typename Word<sizeof(T) * N>::type;
  T items[N];
  FLORA_UNROLL
  for (int i = 0; i < N; ++i) narrow(from[i], items + i);
  W word;
  memcpy(&word, items, sizeof word);
  *reinterpret_cast<W*>(to) = word;
}
#else
template <typename T, int N>
struct Raw {
  T items[N];

  FLORA_FN void read(const T* from) { std::memcpy(items, from, sizeof items); }
  FLORA_FN void read_fresh(const T* from) { read(from); }
  FLORA_FN Raw settled() const { return *this; }
  FLORA_FN void widen_to(float (&to)[N]) const {
    for (int i = 0; i < N; ++i) to[i] = widen(items[i]);
  }
};
template <typename T, int N>
FLORA_FN void store(const float (&from)[N], T* to) {
  for (int i = 0; i < N; ++i) narrow(from[i], to + i);
}
#endif

// Weights.
template <typename T, int N>
FLORA_FN void load(const T* from, float (&to)[N]) {
  Raw<T, N> raw;
  raw.read(from);
  raw.widen_to(to);
}

// What a kernel before this one has written: not from a processor's own cache, which may have kept what was there
// before. This kernel may have begun when that was still read, see early.h.
template <typename T, int N>
FLORA_FN void load_fresh(const T* from, float (&to)[N]) {
  Raw<T, N> raw;
  raw.read_fresh(from);
  raw.widen_to(to);
}

FLORA_FN float activate(float x, Activation kind) {
  if (kind == Activation::kSilu) return x / (1.0f + expf(-x));
  if (kind == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// Which rows of B reach a column of p, in which column of B, and by which block; none where no block does (-1).
struct Reach {
  int32_t first, last, from, block;
};

FLORA_FN Reach reach_of(const Call& call, int32_t column) {
  Reach found{0, 0, 0, -1};
  for (int i = 0; i < call.blocks; ++i) {
    const Block& block = call.block[i];
    if (block.begin <= column && column < block.end)
      found = {block.first, block.last, column - block.begin + block.from, i};
  }
  return found;
}

// Which adapter a row has, where rows have their own; -1: none.
FLORA_FN int32_t adapter_of(const Call& call, int64_t row) {
  const int32_t place = call.share == 1 ? static_cast<int32_t>(row) : static_cast<int32_t>(row) / call.share;
#if defined(__CUDACC__)
  const int64_t id = __ldcg(reinterpret_cast<const long long*>(call.ids) + place);  // anew: see the prefetch
#else
  const int64_t id = call.ids[place];
#endif
  return id >= 0 && id < call.adapters ? static_cast<int32_t>(id) : -1;
}

// What of it an adapter has.
FLORA_FN Reach reach_of_adapter(const Call& call, const Reach& whole, int32_t adapter) {
  if (adapter < 0 || whole.block < 0) return {0, 0, whole.from, whole.block};
  const uint16_t* edge = call.edge + whole.block * (call.adapters + 1) + adapter;
  return {edge[0], edge[1], whole.from, whole.block};
}

// The column of p that a column of the output is.
FLORA_FN int32_t column_of(const Call& call, int32_t at) {
  int32_t column = call.part[0].start + at;
  for (int i = 1; i < call.parts; ++i)
    if (call.part[i].at <= at) column = call.part[i].start + at - call.part[i].at;
  return column;
}

// To the sums of TM rows come their z times rows of B. Where rows are APART, only to those whose bits are in `mine`: what
// is not theirs is not multiplied with zero, which would not keep out what is infinite.
template <typename T, int VEC, int KV, int TM, bool APART>
FLORA_FN void multiply(const Call& call, const Reach& reach, const T* const (&z)[TM], uint32_t mine,
                       float (&sum)[TM][VEC]) {
  const T* b = static_cast<const T*>(call.b) + reach.from;
#if defined(__CUDACC__)
#pragma unroll(TM > 1 ? (KV > 1 ? 1 : 4) : (KV > 1 ? 2 : 8))
#endif
  for (int32_t k = reach.first; k < reach.last; k += KV) {
    float low[TM][KV];
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) load_fresh<T, KV>(z[t] + k, low[t]);
    if (call.z_bias != nullptr) {
      float bias[KV];
      load<T, KV>(static_cast<const T*>(call.z_bias) + k, bias);
      FLORA_UNROLL
      for (int t = 0; t < TM; ++t) {
        FLORA_UNROLL
        for (int i = 0; i < KV; ++i) low[t][i] += bias[i];
      }
    }
    FLORA_UNROLL
    for (int i = 0; i < KV; ++i) {
      float up[VEC];
      load<T, VEC>(b + static_cast<int64_t>(k + i) * call.columns, up);
      FLORA_UNROLL
      for (int t = 0; t < TM; ++t) {
        if (APART && (mine >> t & 1) == 0) continue;
        FLORA_UNROLL
        for (int v = 0; v < VEC; ++v) sum[t][v] += low[t][i] * up[v];
      }
    }
  }
}

// Adapter by adapter of those that TM rows have: rows of one read B together.
template <typename T, int VEC, int KV, int TM>
FLORA_FN void multiply_apart(const Call& call, const Reach& whole, int64_t row, const T* const (&z)[TM],
                             float (&sum)[TM][VEC]) {
  static_assert(TM <= 4 && kEdges <= 256, "a byte for each row's adapter, 0 for none");
  uint32_t adapters = 0;
  FLORA_UNROLL
  for (int t = 0; t < TM; ++t)
    adapters |= static_cast<uint32_t>(adapter_of(call, row + t < call.rows ? row + t : call.rows - 1) + 1) << 8 * t;
  for (uint32_t left = (1u << TM) - 1; left != 0;) {
    uint32_t next = 0, mine = 0;
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t)
      if (left >> t & 1) next = adapters >> 8 * t & 255;
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t)
      if ((adapters >> 8 * t & 255) == next) mine |= 1u << t;
    left &= ~mine;
    const Reach reach = reach_of_adapter(call, whole, static_cast<int32_t>(next) - 1);
    multiply<T, VEC, KV, TM, true>(call, reach, z, mine, sum);
  }
}

constexpr int32_t kRowsAhead = 16;  // of B

// B's rows in some columns, read before anything else where HOLDS: weights need not be waited for. Where rows have
// adapters of their own, they are those of the adapter that a row seems to have: its id may be written only meanwhile.
template <typename T, int VEC, int KV, bool HOLDS>
struct Ahead {
  Reach whole, reach;  // of all adapters, and of the one whose rows are held
  int32_t adapter = -1;
  bool held = false;
  Raw<T, VEC> row[HOLDS ? kRowsAhead : 1];

  FLORA_FN void read(const Call& call, int64_t row_of_p, int32_t column) {
    whole = reach = reach_of(call, column);
    if constexpr (HOLDS) {
      if (call.ids != nullptr) {
        adapter = adapter_of(call, row_of_p);
        reach = reach_of_adapter(call, whole, adapter);
      }
      held = reach.last - reach.first <= kRowsAhead;
      if (!held) return;
      const T* b = static_cast<const T*>(call.b) + reach.from;
      FLORA_UNROLL
      for (int32_t k = 0; k < kRowsAhead; ++k)
        if (reach.first + k < reach.last) row[k].read(b + static_cast<int64_t>(reach.first + k) * call.columns);
    }
  }

  // Whether what is held is a row's, now that its id is there.
  FLORA_FN bool holds(const Call& call, int64_t row_of_p) const {
    return held && (call.ids == nullptr || adapter_of(call, row_of_p) == adapter);
  }

  FLORA_FN void multiply(const Call& call, const T* z, float (&sum)[VEC]) const {
    static_assert(!HOLDS || kRowsAhead % KV == 0, "of z as many are read at once");
    FLORA_UNROLL
    for (int32_t k = 0; k < kRowsAhead; k += KV) {
      if (reach.first + k >= reach.last) continue;
      float low[KV];
      load_fresh<T, KV>(z + reach.first + k, low);
      if (call.z_bias != nullptr) {
        float bias[KV];
        load<T, KV>(static_cast<const T*>(call.z_bias) + reach.first + k, bias);
        FLORA_UNROLL
        for (int i = 0; i < KV; ++i) low[i] += bias[i];
      }
      FLORA_UNROLL
      for (int i = 0; i < KV; ++i) {
        float up[VEC];
        row[k + i].settled().widen_to(up);
        FLORA_UNROLL
        for (int v = 0; v < VEC; ++v) sum[v] += low[i] * up[v];
      }
    }
  }
};

// Whether a kernel holds B: where it has one row at a time, and reads z as widely as B.
template <int KV, int TM>
constexpr bool kHolds = TM == 1 && KV > 1;

// p + z B in the columns column..column + VEC of the rows row..row + TM; a row that is not there repeats the last one.
// APART: they may differ in their adapter.
template <typename T, int VEC, int KV, int TM, bool APART, bool HOLDS>
FLORA_FN void accumulate(const Call& call, const Ahead<T, VEC, KV, HOLDS>& ahead, int64_t row, int32_t column,
                         float (&sum)[TM][VEC]) {
  const T* p = static_cast<const T*>(call.p);
  const T* z[TM];
  FLORA_UNROLL
  for (int t = 0; t < TM; ++t) {
    const int64_t at = row + t < call.rows ? row + t : call.rows - 1;
    load_fresh<T, VEC>(p + at * call.stride + column, sum[t]);
    z[t] = static_cast<const T*>(call.z) + at * call.z_stride;
  }
  if (call.bias != nullptr) {
    float bias[VEC];
    load<T, VEC>(static_cast<const T*>(call.bias) + column, bias);
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      FLORA_UNROLL
      for (int v = 0; v < VEC; ++v) sum[t][v] += bias[v];
    }
  }
  if constexpr (HOLDS) {
    static_assert(TM == 1, "one row at a time");
    if (ahead.holds(call, row)) return ahead.multiply(call, z[0], sum[0]);
  }
  if constexpr (APART) {
    multiply_apart<T, VEC, KV, TM>(call, ahead.whole, row, z, sum);
  } else {
    Reach reach = ahead.whole;
    if (call.ids != nullptr) reach = reach_of_adapter(call, reach, adapter_of(call, row));
    multiply<T, VEC, KV, TM, false>(call, reach, z, 0, sum);
  }
}

template <typename T, int VEC, int KV, int TM, bool APART>
struct AddThread {
  int32_t column, source;  // of the output, and of p
  Ahead<T, VEC, KV, kHolds<KV, TM>> ahead;

  FLORA_FN void begin(const Call& call, int64_t row, int32_t chunk) {
    column = chunk * VEC;
    if (column >= call.width) return;
    source = column_of(call, column);
    ahead.read(call, row, source);
  }

  FLORA_FN void run(const Call& call, int64_t tile) const {
    if (column >= call.width) return;
    float sum[TM][VEC];
    accumulate<T, VEC, KV, TM, APART>(call, ahead, tile * TM, source, sum);
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      const int64_t row = tile * TM + t;
      if (row < call.rows) store<T, VEC>(sum[t], static_cast<T*>(call.out) + row * call.width + column);
    }
  }
};

template <typename T, int VEC, int KV, int TM, bool APART>
struct SwiGLUThread {
  int32_t column;
  Ahead<T, VEC, KV, kHolds<KV, TM>> of_gate, of_up;

  FLORA_FN void begin(const Call& call, int64_t row, int32_t chunk) {
    column = chunk * VEC;
    if (column >= call.width) return;
    of_gate.read(call, row, call.part[0].start + column);
    of_up.read(call, row, call.up + column);
  }

  FLORA_FN void run(const Call& call, int64_t tile) const {
    if (column >= call.width) return;
    float gate[TM][VEC], up[TM][VEC];
    accumulate<T, VEC, KV, TM, APART>(call, of_gate, tile * TM, call.part[0].start + column, gate);
    accumulate<T, VEC, KV, TM, APART>(call, of_up, tile * TM, call.up + column, up);
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      const int64_t row = tile * TM + t;
      FLORA_UNROLL
      for (int v = 0; v < VEC; ++v) up[t][v] *= activate(gate[t][v], call.activation);
      if (row < call.rows) store<T, VEC>(up[t], static_cast<T*>(call.out) + row * call.width + column);
    }
  }
};

// A thread of a norm: it gathers its columns and their squares, waits for the sum of all threads, and finishes.
// CH is how many chunks of columns it keeps meanwhile; 0: any number, computed anew at the end.
template <typename T, int VEC, int KV, int TM, bool APART, int CH>
struct NormThread {
  static constexpr bool kOne = CH == 1;  // it knows its columns before
  Ahead<T, VEC, KV, kOne && kHolds<KV, TM>> ahead;
  float kept[CH > 0 ? CH : 1][TM][VEC];
  float squares[TM];

  FLORA_FN void begin(const Call& call, int64_t row, int32_t base, int32_t thread) {
    if (kOne && thread * VEC < call.group) ahead.read(call, row, call.part[0].start + base + thread * VEC);
  }

  FLORA_FN void chunk(const Call& call, int64_t tile, int32_t base, int32_t column, float (&sum)[TM][VEC]) {
    if (!kOne) ahead.read(call, tile * TM, call.part[0].start + base + column);
    accumulate<T, VEC, KV, TM, APART>(call, ahead, tile * TM, call.part[0].start + base + column, sum);
    if (call.skip == nullptr) return;
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      const int64_t row = tile * TM + t < call.rows ? tile * TM + t : call.rows - 1;
      float skip[VEC];
      load_fresh<T, VEC>(static_cast<const T*>(call.skip) + row * call.width + base + column, skip);
      FLORA_UNROLL
      for (int v = 0; v < VEC; ++v) sum[t][v] += skip[v];
    }
  }

  FLORA_FN void gathered(const Call& call, int64_t tile, int32_t at, const float (&sum)[TM][VEC]) {
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      const int64_t row = tile * TM + t;
      FLORA_UNROLL
      for (int v = 0; v < VEC; ++v) squares[t] += sum[t][v] * sum[t][v];
      if (call.sum != nullptr && row < call.rows)
        store<T, VEC>(sum[t], static_cast<T*>(call.sum) + row * call.width + at);
    }
  }

  FLORA_FN void gather(const Call& call, int64_t tile, int32_t base, int32_t thread, int32_t threads) {
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) squares[t] = 0.0f;
    if constexpr (CH > 0) {
      FLORA_UNROLL
      for (int c = 0; c < CH; ++c) {
        const int32_t column = (thread + c * threads) * VEC;
        if (column < call.group) {
          chunk(call, tile, base, column, kept[c]);
          gathered(call, tile, base + column, kept[c]);
        }
      }
    } else {
      for (int32_t column = thread * VEC; column < call.group; column += threads * VEC) {
        chunk(call, tile, base, column, kept[0]);
        gathered(call, tile, base + column, kept[0]);
      }
    }
  }

  FLORA_FN void finished(const Call& call, int64_t tile, int32_t base, int32_t column, const float (&total)[TM],
                         float (&sum)[TM][VEC]) const {
    float gamma[VEC];
    load<T, VEC>(static_cast<const T*>(call.gamma) + column, gamma);
    FLORA_UNROLL
    for (int t = 0; t < TM; ++t) {
      const int64_t row = tile * TM + t;
      const float scale = 1.0f / sqrtf(total[t] / static_cast<float>(call.group) + call.epsilon);
      FLORA_UNROLL
      for (int v = 0; v < VEC; ++v) sum[t][v] *= scale * gamma[v];
      if (row < call.rows) store<T, VEC>(sum[t], static_cast<T*>(call.out) + row * call.width + base + column);
    }
  }

  FLORA_FN void finish(const Call& call, int64_t tile, int32_t base, int32_t thread, int32_t threads,
                       const float (&total)[TM]) {
    if constexpr (CH > 0) {
      FLORA_UNROLL
      for (int c = 0; c < CH; ++c) {
        const int32_t column = (thread + c * threads) * VEC;
        if (column < call.group) finished(call, tile, base, column, total, kept[c]);
      }
    } else {
      for (int32_t column = thread * VEC; column < call.group; column += threads * VEC) {
        chunk(call, tile, base, column, kept[0]);
        finished(call, tile, base, column, total, kept[0]);
      }
    }
  }
};

}  // namespace FLORA_SPACE
}  // namespace flora
