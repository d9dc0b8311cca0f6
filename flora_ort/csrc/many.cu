// The GPU's kernel for many rows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arithmetic.h"
#include "device.h"
#include "early.h"
#include "many.h"
#include "many_device.h"
#include "mma.h"

namespace flora {
namespace {

using portable::load;
using portable::load_fresh;
using portable::Reach;

constexpr int kProducts = kWarpColumns / 8;

template <int STEPS>
struct Up {
  Reach reach;
  uint32_t b[STEPS][kProducts][2];

  // The part of B that reaches 32 columns of p; zero where there is none.
  __device__ void read(const Call& call, int32_t column, int32_t lane) {
    reach = portable::reach_of(call, column);
    const uint16_t* from = static_cast<const uint16_t*>(call.b) + reach.from;
    const int32_t g = lane / 4, t = lane % 4;
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int j = 0; j < kProducts; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int32_t row = reach.first + s * kStep + 2 * t + 8 * half;
          const uint16_t* at = from + static_cast<int64_t>(row) * call.columns + column_of_b(g, j);
          const uint32_t low = row < reach.last ? __ldg(at) : 0;
          const uint32_t high = row + 1 < reach.last ? __ldg(at + call.columns) : 0;
          b[s][j][half] = low | high << 16;
        }
  }
};

// p + z B in two rows and 8 columns each.
template <typename T, Element ELEMENT, int STEPS>
__device__ void add_up(const Call& call, const Up<STEPS>& up, const int64_t (&row)[2], int32_t column, int32_t lane,
                       float (&sum)[2][8]) {
  const int32_t t = lane % 4;
  const T* p = static_cast<const T*>(call.p) + column + 8 * t;
#pragma unroll
  for (int i = 0; i < 2; ++i) load_fresh<T, 8>(p + row[i] * call.stride, sum[i]);
  if (call.bias != nullptr) {
    float bias[8];
    load<T, 8>(static_cast<const T*>(call.bias) + column + 8 * t, bias);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int v = 0; v < 8; ++v) sum[i][v] += bias[v];
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    uint32_t a[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int32_t k = up.reach.first + s * kStep + 2 * t + 8 * (part / 2);
      const T* z = static_cast<const T*>(call.z) + row[part % 2] * call.z_stride + k;
      a[part] = k < up.reach.last ? __ldcg(reinterpret_cast<const uint32_t*>(z)) : 0;
    }
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      float part[4] = {sum[0][2 * j], sum[0][2 * j + 1], sum[1][2 * j], sum[1][2 * j + 1]};
      mma<ELEMENT>(part, a[0], a[1], a[2], a[3], up.b[s][j][0], up.b[s][j][1]);
      sum[0][2 * j] = part[0], sum[0][2 * j + 1] = part[1], sum[1][2 * j] = part[2], sum[1][2 * j + 1] = part[3];
    }
  }
}

template <typename T, Element ELEMENT, bool GATED, int STEPS>
__global__ void __launch_bounds__(32 * kManyWarps)
    many_kernel(const __grid_constant__ Call call, const __grid_constant__ ManyPlan plan) {
  const int32_t lane = threadIdx.x % 32, at = (blockIdx.x * kManyWarps + threadIdx.x / 32) * kWarpColumns;
  if (at >= call.width) return;
  const int32_t column = portable::column_of(call, at);
  Up<STEPS> first, second;
  first.read(call, column, lane);
  if constexpr (GATED) second.read(call, call.up + at, lane);
  wait_for_inputs();
  for (int64_t tile = blockIdx.y; tile * kRowTile < call.rows; tile += plan.down) {
    int64_t row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t wanted = tile * kRowTile + lane / 4 + 8 * i;
      row[i] = wanted < call.rows ? wanted : call.rows - 1;
    }
    float sum[2][8];
    add_up<T, ELEMENT, STEPS>(call, first, row, column, lane, sum);
    if constexpr (GATED) {
      float up[2][8];
      add_up<T, ELEMENT, STEPS>(call, second, row, call.up + at, lane, up);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int v = 0; v < 8; ++v) sum[i][v] = up[i][v] * portable::activate(sum[i][v], call.activation);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)  // a row that is not there repeats the last one
      portable::store<T, 8>(sum[i], static_cast<T*>(call.out) + row[i] * call.width + at + 8 * (lane % 4));
  }
}

template <typename T, Element ELEMENT, bool GATED>
const char* start(const Call& call, const ManyPlan& plan, void* stream) {
  const auto kernel = plan.steps == 1   ? many_kernel<T, ELEMENT, GATED, 1>
                      : plan.steps == 2 ? many_kernel<T, ELEMENT, GATED, 2>
                                        : many_kernel<T, ELEMENT, GATED, kMostSteps>;
  return launch(kernel, dim3(plan.across, plan.down), dim3(32 * kManyWarps), stream, call, plan);
}

template <typename T, Element ELEMENT>
const char* start(const Call& call, const ManyPlan& plan, void* stream) {
  return call.op == Operator::kSwiGLU ? start<T, ELEMENT, true>(call, plan, stream)
                                      : start<T, ELEMENT, false>(call, plan, stream);
}

}  // namespace

const char* run_many_on_device(const Call& call, void* stream) {
  const ManyPlan plan = plan_many(call, processors());
  return call.element == Element::kHalf ? start<portable::Half, Element::kHalf>(call, plan, stream)
                                        : start<portable::BFloat, Element::kBFloat>(call, plan, stream);
}

}  // namespace flora
