// One launch a call, on the caller's stream, which may be captured into a CUDA graph.
//
// From compute capability 9 on a kernel may be launched while the one before it ends (programmatic dependent launch):
// until that has ended it reads nothing but B, which the weights of a layer have driven from the caches since the last
// token: into registers where that is possible, else into the L2 cache. Where rows have adapters of their own, ids are
// read as well, and once more afterwards: those who write them may not have ended.
#include "arithmetic.h"
#include "device.h"
#include "early.h"
#include "many.h"
#include "many_device.h"
#include "plan.h"

namespace flora {
namespace {

using portable::BFloat;
using portable::Half;

template <typename T>
__device__ void prefetch(const Call& call, int64_t row, int32_t column) {
#if __CUDA_ARCH__ >= 900
  portable::Reach reach = portable::reach_of(call, column);
  if (call.ids != nullptr) reach = portable::reach_of_adapter(call, reach, portable::adapter_of(call, row));
  const T* b = static_cast<const T*>(call.b) + reach.from;
  for (int32_t k = reach.first; k < reach.last; ++k)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(b + static_cast<int64_t>(k) * call.columns));
#endif
}

template <typename T, int VEC, int KV, int TM, bool APART>
__global__ void __launch_bounds__(128, 1) add_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
  const int32_t chunk = blockIdx.x * blockDim.x + threadIdx.x;
  portable::AddThread<T, VEC, KV, TM, APART> thread;
  thread.begin(call, blockIdx.y * TM, chunk);
  if (TM == 1 && chunk * VEC < call.width && !thread.ahead.held) prefetch<T>(call, blockIdx.y, thread.source);
  wait_for_inputs();
  for (int64_t tile = blockIdx.y; tile < plan.down; tile += gridDim.y) thread.run(call, tile);
}

template <typename T, int VEC, int KV, int TM, bool APART>
__global__ void __launch_bounds__(128, 1)
    swiglu_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
  const int32_t chunk = blockIdx.x * blockDim.x + threadIdx.x;
  portable::SwiGLUThread<T, VEC, KV, TM, APART> thread;
  thread.begin(call, blockIdx.y * TM, chunk);
  if (TM == 1 && chunk * VEC < call.width && !(thread.of_gate.held && thread.of_up.held)) {
    prefetch<T>(call, blockIdx.y, call.part[0].start + chunk * VEC);
    prefetch<T>(call, blockIdx.y, call.up + chunk * VEC);
  }
  wait_for_inputs();
  for (int64_t tile = blockIdx.y; tile < plan.down; tile += gridDim.y) thread.run(call, tile);
}

template <int TM>
__device__ void sum_over_block(const float (&mine)[TM], float (&total)[TM], float (&shared)[TM][32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int t = 0; t < TM; ++t) {
    float value = mine[t];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0) shared[t][warp] = value;
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TM; ++t) {
    float value = lane < warps ? shared[t][lane] : 0.0f;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    total[t] = value;
  }
  __syncthreads();  // the next tile writes there again
}

template <typename T, int VEC, int KV, int TM, bool APART, int CH>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_kernel(const __grid_constant__ Call call, const __grid_constant__ Plan plan) {
  __shared__ float shared[TM][32];
  const int32_t base = blockIdx.x * call.group;
  portable::NormThread<T, VEC, KV, TM, APART, CH> thread;
  thread.begin(call, blockIdx.y * TM, base, threadIdx.x);
  if (TM == 1 && !thread.ahead.held) {
    for (int32_t column = threadIdx.x * VEC; column < call.group; column += blockDim.x * VEC)
      prefetch<T>(call, blockIdx.y, call.part[0].start + base + column);
  }
  wait_for_inputs();
  for (int64_t tile = blockIdx.y; tile < plan.down; tile += gridDim.y) {
    thread.gather(call, tile, base, threadIdx.x, blockDim.x);
    float total[TM];
    sum_over_block<TM>(thread.squares, total, shared);
    thread.finish(call, tile, base, threadIdx.x, blockDim.x, total);
  }
}

using Kernel = void (*)(Call, Plan);

template <typename T, int VEC, int KV, int TM, bool APART>
Kernel kernel_of_rows(const Call& call, const Plan& plan) {
  if (call.op == Operator::kAdd) return add_kernel<T, VEC, KV, TM, APART>;
  if (call.op == Operator::kSwiGLU) return swiglu_kernel<T, VEC, KV, TM, APART>;
  if constexpr (TM > 1) return norm_kernel<T, VEC, KV, TM, APART, 1>;
  if (plan.keep == 1) return norm_kernel<T, VEC, KV, 1, false, 1>;
  return plan.keep > 1 ? norm_kernel<T, VEC, KV, 1, false, kKeep> : norm_kernel<T, VEC, KV, 1, false, 0>;
}

template <typename T, int VEC, int KV>
Kernel kernel_of(const Call& call, const Plan& plan) {
  if (plan.apart) return kernel_of_rows<T, VEC, KV, kTile, true>(call, plan);
  return plan.tile > 1 ? kernel_of_rows<T, VEC, KV, kTile, false>(call, plan)
                       : kernel_of_rows<T, VEC, KV, 1, false>(call, plan);
}

template <typename T>
Kernel find_kernel(const Call& call, const Plan& plan) {
  constexpr int kWide = 16 / sizeof(T);
  if (plan.wide_z) return kernel_of<T, kWide, kWide>(call, plan);
  if (plan.wide) return kernel_of<T, kWide, 1>(call, plan);
  return kernel_of<T, 1, 1>(call, plan);
}

}  // namespace

const char* run_on_device(const Call& call, void* stream) {
  const Plan plan = plan_for_device(call);
  if (is_many(call, plan)) return run_many_on_device(call, stream);
  const Kernel kernel = call.element == Element::kFloat  ? find_kernel<float>(call, plan)
                        : call.element == Element::kHalf ? find_kernel<Half>(call, plan)
                                                         : find_kernel<BFloat>(call, plan);
  const dim3 grid(plan.across, static_cast<unsigned>(plan.down < 65535 ? plan.down : 65535));
  return launch(kernel, grid, dim3(plan.threads), stream, call, plan);
}

}  // namespace flora
