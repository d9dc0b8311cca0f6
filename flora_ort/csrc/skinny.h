// y = x W^T for a few rows of x: a tile of W's rows is read once, whatever the number of rows.
//
// W is [n, k] with k contiguous, and so is A [r, k], if there is one: z = x A^T is computed in the same launch.
// A block has 16 rows of W; its warps take turns at its columns, 32 at a time. Which lane holds what is what
// mma.m16n8k16 wants: rows g and g + 8 of W, 8 neighbouring columns each, for g = lane / 4; and of x's row g the same
// columns. In which order columns are summed is the same for both.
#pragma once

#include <cstdint>

#include "call.h"

namespace flora {

constexpr int32_t kSkinnyRows = 8;      // of x, at most
constexpr int32_t kTileRows = 16;       // of W, for a block
constexpr int32_t kChunk = 32;          // columns of W that a warp reads at once: 16 bytes a lane and row
constexpr int32_t kChunksAhead = 4;     // that a warp has under way
constexpr int32_t kSkinnyWarps = 16;    // of a block, at most

struct SkinnyCall {
  Element element;  // kHalf or kBFloat
  const void* x;    // [rows, k]
  const void* w;    // [n, k]
  const void* a;    // [r, k], or null
  void* y;          // [rows, n]
  void* z;          // [rows, r], or null
  int64_t rows;
  int32_t k, n, r;
};

struct SkinnyPlan {
  int32_t warps;  // of a block
  int32_t tiles;  // blocks: of W, and then of A
};

// As measured on an H200: half of a block's most warps, so that a processor has two blocks at least, one waiting for
// memory while the other multiplies; all of them where there is no second block for a processor.
inline SkinnyPlan plan_skinny(const SkinnyCall& call, int32_t processors) {
  const int32_t chunks = call.k / kChunk, each = (chunks + kChunksAhead - 1) / kChunksAhead;
  const auto tiles_of = [](int32_t rows) { return (rows + kTileRows - 1) / kTileRows; };
  const int32_t tiles = tiles_of(call.n) + tiles_of(call.r);
  const int32_t most = tiles <= processors ? kSkinnyWarps : kSkinnyWarps / 2;
  return {each < most ? each : most, tiles};
}

// What a tile has to do with: a matrix, its rows, where the result goes, and the first of its rows that are in the tile.
struct SkinnyTile {
  const uint16_t* matrix;
  uint16_t* out;
  int32_t rows, first;
};

FLORA_BOTH SkinnyTile tile_of(const SkinnyCall& call, int32_t tile) {
  const int32_t of_w = (call.n + kTileRows - 1) / kTileRows;
  if (tile < of_w) return {static_cast<const uint16_t*>(call.w), static_cast<uint16_t*>(call.y), call.n, tile * kTileRows};
  return {static_cast<const uint16_t*>(call.a), static_cast<uint16_t*>(call.z), call.r, (tile - of_w) * kTileRows};
}

// Where a lane reads in the matrix of a tile: its upper row, or its lower one. A row that is not there is the last one.
FLORA_BOTH int64_t matrix_place(const SkinnyCall& call, const SkinnyTile& tile, int32_t lane, bool lower, int32_t chunk) {
  const int32_t row = tile.first + lane / 4 + (lower ? 8 : 0);
  const int32_t kept = row < tile.rows ? row : tile.rows - 1;
  return static_cast<int64_t>(kept) * call.k + chunk * kChunk + lane % 4 * 8;
}

// Where it reads in x, if its row is there.
FLORA_BOTH int64_t x_place(const SkinnyCall& call, int32_t lane, int32_t chunk) {
  return static_cast<int64_t>(lane / 4) * call.k + chunk * kChunk + lane % 4 * 8;
}

}  // namespace flora
