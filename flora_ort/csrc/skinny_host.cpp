#include "skinny_host.h"

#include <cstring>

#include "arithmetic.h"

namespace flora {
namespace {

constexpr int32_t kLanes = 32, kHeld = 8;  // numbers of two bytes that a lane reads at once

struct Fragment {
  float number[kHeld];
};

float widened(Element element, uint16_t bits) {
  return element == Element::kHalf ? portable::widen(portable::Half{bits}) : portable::widen(portable::BFloat{bits});
}

uint16_t narrowed(Element element, float value) {
  portable::Half half;
  portable::BFloat bfloat;
  portable::narrow(value, &half);
  portable::narrow(value, &bfloat);
  return element == Element::kHalf ? half.bits : bfloat.bits;
}

Fragment read(Element element, const uint16_t* from) {
  Fragment found;
  for (int i = 0; i < kHeld; ++i) found.number[i] = widened(element, from[i]);
  return found;
}

// What two mma's add up: a lane's part i of x meets part i of the same quarter's lanes in W.
void multiply(const Fragment (&upper)[kLanes], const Fragment (&lower)[kLanes], const Fragment (&x)[kLanes],
              float (&sum)[kTileRows][kSkinnyRows]) {
  for (int g = 0; g < 8; ++g)
    for (int row = 0; row < kSkinnyRows; ++row)
      for (int t = 0; t < 4; ++t)
        for (int i = 0; i < kHeld; ++i) {
          sum[g][row] += upper[4 * g + t].number[i] * x[4 * row + t].number[i];
          sum[g + 8][row] += lower[4 * g + t].number[i] * x[4 * row + t].number[i];
        }
}

}  // namespace

void run_skinny_block(const SkinnyCall& call, const SkinnyPlan& plan, int32_t block) {
  const SkinnyTile tile = tile_of(call, block);
  const auto* x = static_cast<const uint16_t*>(call.x);
  const int32_t chunks = call.k / kChunk;
  float total[kTileRows][kSkinnyRows] = {};
  for (int32_t warp = 0; warp < plan.warps; ++warp) {
    float sum[kTileRows][kSkinnyRows] = {};
    for (int32_t first = warp * kChunksAhead; first < chunks; first += plan.warps * kChunksAhead)
      for (int32_t chunk = first; chunk < first + kChunksAhead && chunk < chunks; ++chunk) {
        Fragment upper[kLanes], lower[kLanes], at[kLanes] = {};
        for (int32_t lane = 0; lane < kLanes; ++lane) {
          upper[lane] = read(call.element, tile.matrix + matrix_place(call, tile, lane, false, chunk));
          lower[lane] = read(call.element, tile.matrix + matrix_place(call, tile, lane, true, chunk));
          if (lane / 4 < call.rows) at[lane] = read(call.element, x + x_place(call, lane, chunk));
        }
        multiply(upper, lower, at, sum);
      }
    for (int i = 0; i < kTileRows; ++i)
      for (int row = 0; row < kSkinnyRows; ++row) total[i][row] += sum[i][row];
  }
  for (int32_t i = 0; i < kTileRows && tile.first + i < tile.rows; ++i)
    for (int64_t row = 0; row < call.rows; ++row)
      tile.out[row * tile.rows + tile.first + i] = narrowed(call.element, total[i][row]);
}

}  // namespace flora
