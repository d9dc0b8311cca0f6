// The grid of a plan, run by loops: the CPU's kernel, and what the GPU's kernel does with the same indices.
#pragma once

#include <cstdlib>

#include "arithmetic.h"
#include "plan.h"

namespace flora {
namespace FLORA_SPACE {

template <typename T, int VEC, int KV, int TM, int CH>
inline void norm_block(const Call& call, const Plan& plan, int64_t tile, int32_t group) {
  using Thread = NormThread<T, VEC, KV, TM, CH>;
  const int32_t base = group * call.group;
  Thread* threads = static_cast<Thread*>(std::malloc(sizeof(Thread) * plan.threads));
  if (threads == nullptr) std::abort();
  float total[TM] = {};
  for (int32_t i = 0; i < plan.threads; ++i) {
    threads[i].gather(call, tile, base, i, plan.threads);
    for (int t = 0; t < TM; ++t) total[t] += threads[i].squares[t];
  }
  for (int32_t i = 0; i < plan.threads; ++i) threads[i].finish(call, tile, base, i, plan.threads, total);
  std::free(threads);
}

template <typename T, int VEC, int KV, int TM, int CH>
inline void run_block(const Call& call, const Plan& plan, int64_t index) {
  const int64_t tile = index / plan.across;
  const int32_t across = static_cast<int32_t>(index % plan.across);
  if (call.op == Operator::kNorm) return norm_block<T, VEC, KV, TM, CH>(call, plan, tile, across);
  for (int32_t i = 0; i < plan.threads; ++i) {
    const int32_t chunk = across * plan.threads + i;
    if (call.op == Operator::kAdd)
      add_thread<T, VEC, KV, TM>(call, tile, chunk);
    else
      swiglu_thread<T, VEC, KV, TM>(call, tile, chunk);
  }
}

using RunBlock = void (*)(const Call&, const Plan&, int64_t);

// Whichever of the GPU's kernels a plan names.
template <typename T>
RunBlock device_block(const Plan& plan) {
  constexpr int kWide = 16 / sizeof(T);
#define FLORA_PICK(VEC, KV)                                           \
  (plan.tile > 1 ? run_block<T, VEC, KV, kTile, 1> : plan.keep > 0 ? run_block<T, VEC, KV, 1, kKeep> \
                                                                    : run_block<T, VEC, KV, 1, 0>)
  if (plan.wide_z) return FLORA_PICK(kWide, kWide);
  if (plan.wide) return FLORA_PICK(kWide, 1);
  return FLORA_PICK(1, 1);
#undef FLORA_PICK
}

template <typename T>
RunBlock host_block(const Plan& plan) {
  if (plan.wide) return plan.tile > 1 ? run_block<T, kHostVec, 1, kTile, 1> : run_block<T, kHostVec, 1, 1, 1>;
  return plan.tile > 1 ? run_block<T, 1, 1, kTile, 1> : run_block<T, 1, 1, 1, 1>;
}

}  // namespace FLORA_SPACE
}  // namespace flora
