// LoraAdd and LoraSwiGLU of many rows: z B by mma.m16n8k16, added to p as it is read.
//
// A warp has 32 neighbouring columns of the output. It reads its part of B once, and goes through tiles of 16 rows. A
// lane has the rows g and g + 8 of a tile, for g = lane / 4, and 8 neighbouring columns of them: those that 4 products
// of 8 columns each leave with it, if their columns are taken in the order of `column_of_b`.
#pragma once

#include <cstdint>

#include "call.h"
#include "plan.h"

namespace flora {

constexpr int32_t kManyRows = 32;      // at least
constexpr int32_t kWarpColumns = 32;   // of a warp
constexpr int32_t kRowTile = 16;       // rows of a product
constexpr int32_t kStep = 16;          // rows of B in a product
constexpr int32_t kMostSteps = 4;
constexpr int32_t kManyWarps = 4;      // of a block

struct ManyPlan {
  int32_t steps;   // 1, 2 or 4: products, one after the other, that all rows of B need
  int32_t across;  // blocks side by side
  int32_t down;    // blocks that share the rows
};

// Whether a call can be computed so: each warp's columns are in one part and one block at most, and 16 bytes are read.
inline bool is_many(const Call& call, const Plan& plan) {
  bool can = call.op != Operator::kNorm && call.element != Element::kFloat && call.rows >= kManyRows &&
             call.ids == nullptr && call.z_bias == nullptr && plan.wide_z && call.up % kWarpColumns == 0;
  for (int i = 0; i < call.parts; ++i)
    can = can && call.part[i].start % kWarpColumns == 0 && call.part[i].width % kWarpColumns == 0;
  for (int i = 0; i < call.blocks; ++i) {
    const Block& block = call.block[i];
    can = can && block.begin % kWarpColumns == 0 && block.end % kWarpColumns == 0 &&
          block.last - block.first <= kStep * kMostSteps;
  }
  return can;
}

inline ManyPlan plan_many(const Call& call, int32_t processors) {
  int32_t rank = 0;
  for (int i = 0; i < call.blocks; ++i) {
    const int32_t of_block = call.block[i].last - call.block[i].first;
    rank = of_block > rank ? of_block : rank;
  }
  ManyPlan plan{};
  plan.steps = rank <= kStep ? 1 : rank <= 2 * kStep ? 2 : kMostSteps;
  plan.across = ceil_div(call.width, kManyWarps * kWarpColumns);
  const int32_t tiles = ceil_div(call.rows, kRowTile), enough = ceil_div(8 * processors, plan.across);
  plan.down = tiles < enough ? tiles : enough;
  return plan;
}

// Of the columns of a warp, the one that column n of product j is.
FLORA_BOTH int32_t column_of_b(int32_t n, int32_t j) { return n / 2 * 8 + 2 * j + n % 2; }

}  // namespace flora
