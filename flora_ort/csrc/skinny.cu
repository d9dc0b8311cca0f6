// The GPU's kernel: before what was launched ahead has ended, a block already has its part of W under way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "early.h"
#include "mma.h"
#include "skinny.h"
#include "skinny_device.h"

namespace flora {
namespace {

__device__ __forceinline__ uint4 load_once(const uint16_t* from) {
  uint4 word;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from));
  return word;
}

template <Element ELEMENT>
__global__ void __launch_bounds__(32 * kSkinnyWarps, 1)
    skinny_kernel(const __grid_constant__ SkinnyCall call, const __grid_constant__ SkinnyPlan plan) {
  __shared__ float part[kSkinnyWarps][kTileRows][kSkinnyRows];
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t chunks = call.k / kChunk, step = plan.warps * kChunksAhead;
  const SkinnyTile tile = tile_of(call, blockIdx.x);
  const uint16_t* upper = tile.matrix + matrix_place(call, tile, lane, false, 0);
  const uint16_t* lower = tile.matrix + matrix_place(call, tile, lane, true, 0);
  const uint16_t* x = static_cast<const uint16_t*>(call.x) + x_place(call, lane, 0);
  const bool there = lane / 4 < call.rows;
  uint4 high[kChunksAhead], low[kChunksAhead];
  int32_t first = warp * kChunksAhead;
#pragma unroll
  for (int c = 0; c < kChunksAhead; ++c) {
    if (first + c < chunks) {
      high[c] = load_once(upper + (first + c) * kChunk);
      low[c] = load_once(lower + (first + c) * kChunk);
    } else {
      high[c] = low[c] = make_uint4(0, 0, 0, 0);
    }
  }
  wait_for_inputs();
  float sum[4] = {};
  for (; first < chunks; first += step) {
    uint4 at[kChunksAhead];
#pragma unroll
    for (int c = 0; c < kChunksAhead; ++c)
      at[c] = there && first + c < chunks ? __ldcg(reinterpret_cast<const uint4*>(x + (first + c) * kChunk)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < kChunksAhead; ++c) {
      mma<ELEMENT>(sum, high[c].x, low[c].x, high[c].y, low[c].y, at[c].x, at[c].y);
      mma<ELEMENT>(sum, high[c].z, low[c].z, high[c].w, low[c].w, at[c].z, at[c].w);
      if (first + step + c < chunks) {
        high[c] = load_once(upper + (first + step + c) * kChunk);
        low[c] = load_once(lower + (first + step + c) * kChunk);
      }
    }
  }
  const int32_t g = lane / 4, t = lane % 4;
  *reinterpret_cast<float2*>(&part[warp][g][2 * t]) = make_float2(sum[0], sum[1]);
  *reinterpret_cast<float2*>(&part[warp][g + 8][2 * t]) = make_float2(sum[2], sum[3]);
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kTileRows * call.rows; i += blockDim.x) {
    const int32_t row = i / kTileRows, column = i % kTileRows;
    if (tile.first + column >= tile.rows) continue;
    float total = 0.0f;
    for (int32_t w = 0; w < plan.warps; ++w) total += part[w][column][row];
    uint16_t bits;
    if constexpr (ELEMENT == Element::kHalf)
      bits = __half_as_ushort(__float2half_rn(total));
    else
      bits = __bfloat16_as_ushort(__float2bfloat16_rn(total));
    tile.out[static_cast<int64_t>(row) * tile.rows + tile.first + column] = bits;
  }
}

}  // namespace

const char* run_skinny_on_device(const SkinnyCall& call, void* stream) {
  const SkinnyPlan plan = plan_skinny(call, processors());
  const auto kernel = call.element == Element::kHalf ? skinny_kernel<Element::kHalf> : skinny_kernel<Element::kBFloat>;
  return launch(kernel, dim3(plan.tiles), dim3(32 * plan.warps), stream, call, plan);
}

}  // namespace flora
