// The grid of a plan, run by loops: the CPU's kernel, and what the GPU's kernel does with the same indices.
#pragma once

#include <cstdlib>

#include "arithmetic.h"
#include "plan.h"

namespace flora {
namespace FLORA_SPACE {

template <typename T, int VEC, int KV, int TM, bool APART, int CH>
inline void norm_block(const Call& call, const Plan& plan, int64_t tile, int32_t group) {
  using Thread = NormThread<T, VEC, KV, TM, APART, CH>;
  const int32_t base = group * call.group;
  Thread* threads = static_cast<Thread*>(std::malloc(sizeof(Thread) * plan.threads));
  if (threads == nullptr) std::abort();
  float total[TM] = {};
  for (int32_t i = 0; i < plan.threads; ++i) {
    threads[i].begin(call, 0, base, i);  // see run_thread
    threads[i].gather(call, tile, base, i, plan.threads);
    for (int t = 0; t < TM; ++t) total[t] += threads[i].squares[t];
  }
  for (int32_t i = 0; i < plan.threads; ++i) threads[i].finish(call, tile, base, i, plan.threads, total);
  std::free(threads);
}

// It begins as if its row had the first one's id: on a GPU ids may be written only after a thread has begun.
template <typename Thread>
inline void run_thread(const Call& call, int64_t tile, int32_t chunk) {
  Thread thread;
  thread.begin(call, 0, chunk);
  thread.run(call, tile);
}

template <typename T, int VEC, int KV, int TM, bool APART, int CH>
inline void run_block(const Call& call, const Plan& plan, int64_t index) {
  const int64_t tile = index / plan.across;
  const int32_t across = static_cast<int32_t>(index % plan.across);
  if (call.op == Operator::kNorm) return norm_block<T, VEC, KV, TM, APART, CH>(call, plan, tile, across);
  for (int32_t i = 0; i < plan.threads; ++i) {
    const int32_t chunk = across * plan.threads + i;
    if (call.op == Operator::kAdd)
      run_thread<AddThread<T, VEC, KV, TM, APART>>(call, tile, chunk);
    else
      run_thread<SwiGLUThread<T, VEC, KV, TM, APART>>(call, tile, chunk);
  }
}

using RunBlock = void (*)(const Call&, const Plan&, int64_t);

// Whichever of the GPU's kernels a plan names.
template <typename T, int VEC, int KV>
RunBlock device_block_of(const Plan& plan) {
  if (plan.apart) return run_block<T, VEC, KV, kTile, true, 1>;
  if (plan.tile > 1) return run_block<T, VEC, KV, kTile, false, 1>;
  if (plan.keep == 1) return run_block<T, VEC, KV, 1, false, 1>;
  return plan.keep > 1 ? run_block<T, VEC, KV, 1, false, kKeep> : run_block<T, VEC, KV, 1, false, 0>;
}

template <typename T>
RunBlock device_block(const Plan& plan) {
  constexpr int kWide = 16 / sizeof(T);
  if (plan.wide_z) return device_block_of<T, kWide, kWide>(plan);
  if (plan.wide) return device_block_of<T, kWide, 1>(plan);
  return device_block_of<T, 1, 1>(plan);
}

template <typename T, int VEC>
RunBlock host_block_of(const Plan& plan) {
  if (plan.apart) return run_block<T, VEC, 1, kTile, true, 1>;
  return plan.tile > 1 ? run_block<T, VEC, 1, kTile, false, 1> : run_block<T, VEC, 1, 1, false, 1>;
}

template <typename T>
RunBlock host_block(const Plan& plan) {
  return plan.wide ? host_block_of<T, kHostVec>(plan) : host_block_of<T, 1>(plan);
}

}  // namespace FLORA_SPACE
}  // namespace flora
