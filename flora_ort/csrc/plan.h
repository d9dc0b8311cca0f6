// How a call is cut into threads.
#pragma once

#include <cstdint>

#include "call.h"

namespace flora {

struct Plan {
  bool wide;        // whether neighbouring columns are read together: 16 bytes on a GPU
  bool wide_z;      // whether neighbouring numbers of z are
  int32_t vec;      // columns of a thread
  int32_t tile;     // rows of a thread
  bool apart;       // whether these may differ in their adapter
  int32_t keep;     // of a norm: chunks that a thread keeps; 0 for any number
  int32_t threads;  // of a block
  int32_t across;   // blocks side by side: of columns, or of a norm's groups
  int64_t down;     // tiles of rows
};

constexpr int32_t kTile = 4, kKeep = 4, kMostThreads = 512;
constexpr int32_t kHostVec = 16;

inline int32_t size_of(Element element) { return element == Element::kFloat ? 4 : 2; }

inline bool divides(const Call& call, int32_t vec) {
  bool all = call.stride % vec == 0 && call.columns % vec == 0 && call.up % vec == 0 && call.group % vec == 0;
  for (int i = 0; i < call.parts; ++i) all = all && call.part[i].start % vec == 0 && call.part[i].width % vec == 0;
  for (int i = 0; i < call.blocks; ++i) {
    const Block& block = call.block[i];
    all = all && block.begin % vec == 0 && block.end % vec == 0 && block.from % vec == 0;
  }
  return all;
}

// How many numbers of `edge` there are.
inline int32_t edges_of(const Call& call) { return call.ids == nullptr ? 0 : call.blocks * (call.adapters + 1); }

inline bool divides_z(const Call& call, int32_t vec) {
  bool all = call.z_stride % vec == 0;
  for (int i = 0; i < edges_of(call); ++i) all = all && call.edge[i] % vec == 0;
  for (int i = 0; i < call.blocks; ++i) all = all && call.block[i].first % vec == 0 && call.block[i].last % vec == 0;
  return all;
}

// Whether so many rows are worth tiles. Rows of a tile read B together, which those of several adapters cannot.
inline bool worth_tiles(const Call& call, int64_t rows) {
  return call.rows >= rows && (call.ids == nullptr || call.share >= kTile);
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

inline Plan plan_for_device(const Call& call) {
  const int32_t wide = 16 / size_of(call.element);
  Plan plan{};
  plan.wide = divides(call, wide) && aligned(call.p) && aligned(call.b) && aligned(call.bias) && aligned(call.skip) &&
              aligned(call.gamma) && aligned(call.out) && aligned(call.sum);
  plan.wide_z = plan.wide && divides_z(call, wide) && aligned(call.z) && aligned(call.z_bias);
  plan.vec = plan.wide ? wide : 1;
  const bool norm = call.op == Operator::kNorm;
  const int32_t chunks = (norm ? call.group : call.width) / plan.vec;
  const int32_t warps = ceil_div(chunks, 32);
  if (norm) {
    plan.threads = 32 * warps < kMostThreads ? 32 * warps : kMostThreads;
    const int32_t each = ceil_div(chunks, plan.threads);
    plan.tile = worth_tiles(call, 8 * kTile) && each == 1 ? kTile : 1;
    plan.keep = each == 1 ? 1 : each <= kKeep ? kKeep : 0;
    plan.across = call.width / call.group;
  } else {
    plan.tile = worth_tiles(call, 8 * kTile) ? kTile : 1;
    const int32_t most = plan.tile > 1 ? 128 : 64;  // a few rows: as many processors as possible
    plan.threads = 32 * warps < most ? 32 * warps : most;
    plan.across = ceil_div(chunks, plan.threads);
  }
  plan.down = (call.rows + plan.tile - 1) / plan.tile;
  plan.apart = plan.tile > 1 && call.ids != nullptr;
  return plan;
}

// On the CPU a block is a tile of rows, and a thread a step of its loop.
inline Plan plan_for_host(const Call& call) {
  Plan plan{};
  plan.wide = divides(call, kHostVec);
  plan.vec = plan.wide ? kHostVec : 1;
  const bool norm = call.op == Operator::kNorm;
  plan.tile = worth_tiles(call, kTile) ? kTile : 1;
  plan.keep = 1;
  plan.threads = (norm ? call.group : call.width) / plan.vec;
  plan.across = norm ? call.width / call.group : 1;
  if (!norm && plan.threads > 64) {
    plan.across = ceil_div(plan.threads, 64);
    plan.threads = 64;
  }
  plan.down = (call.rows + plan.tile - 1) / plan.tile;
  plan.apart = plan.tile > 1 && call.ids != nullptr;
  return plan;
}

}  // namespace flora
