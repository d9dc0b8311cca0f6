#include "many_host.h"

#include <cstring>

#include "arithmetic.h"

namespace flora {
namespace {

constexpr int kLanes = 32, kProducts = kWarpColumns / 8;

// What the lanes of a warp hold for one product, as numbers: see mma.h.
struct Fragments {
  float a[kLanes][4][2], b[kLanes][2][2], sum[kLanes][4];
};

void multiply(Fragments& held) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int part = 0; part < 4; ++part) a[g + 8 * (part % 2)][2 * t + 8 * (part / 2) + i] = held.a[lane][part][i];
      for (int half = 0; half < 2; ++half) b[2 * t + 8 * half + i][g] = held.b[lane][half][i];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) held.sum[lane][i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
}

template <typename T>
void add_up(const Call& call, const ManyPlan& plan, int64_t tile, int32_t column, float (&sum)[kLanes][2][8]) {
  const auto row_of = [&](int lane, int i) {
    const int64_t wanted = tile * kRowTile + lane / 4 + 8 * i;
    return wanted < call.rows ? wanted : call.rows - 1;
  };
  const auto number = [](const void* from, int64_t at) { return portable::widen(static_cast<const T*>(from)[at]); };
  const portable::Reach reach = portable::reach_of(call, column);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 2; ++i)
      for (int v = 0; v < 8; ++v) {
        const int32_t at = column + 8 * (lane % 4) + v;
        sum[lane][i][v] = number(call.p, row_of(lane, i) * call.stride + at);
        if (call.bias != nullptr) sum[lane][i][v] += number(call.bias, at);
      }
  for (int s = 0; s < plan.steps; ++s)
    for (int j = 0; j < kProducts; ++j) {
      Fragments held{};
      for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int e = 0; e < 2; ++e) {
          for (int part = 0; part < 4; ++part) {
            const int32_t k = reach.first + s * kStep + 2 * t + 8 * (part / 2) + e;
            if (k < reach.last) held.a[lane][part][e] = number(call.z, row_of(lane, part % 2) * call.z_stride + k);
          }
          for (int half = 0; half < 2; ++half) {
            const int32_t k = reach.first + s * kStep + 2 * t + 8 * half + e;
            const int64_t at = static_cast<int64_t>(k) * call.columns + reach.from + column_of_b(g, j);
            if (k < reach.last) held.b[lane][half][e] = number(call.b, at);
          }
        }
        for (int i = 0; i < 4; ++i) held.sum[lane][i] = sum[lane][i / 2][2 * j + i % 2];
      }
      multiply(held);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 4; ++i) sum[lane][i / 2][2 * j + i % 2] = held.sum[lane][i];
    }
}

template <typename T>
void run(const Call& call, const ManyPlan& plan, int32_t across, int32_t down) {
  for (int32_t warp = 0; warp < kManyWarps; ++warp) {
    const int32_t at = (across * kManyWarps + warp) * kWarpColumns;
    if (at >= call.width) return;
    for (int64_t tile = down; tile * kRowTile < call.rows; tile += plan.down) {
      float sum[kLanes][2][8], up[kLanes][2][8];
      add_up<T>(call, plan, tile, portable::column_of(call, at), sum);
      if (call.op == Operator::kSwiGLU) add_up<T>(call, plan, tile, call.up + at, up);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 2; ++i) {
          const int64_t row = tile * kRowTile + lane / 4 + 8 * i;
          for (int v = 0; v < 8 && row < call.rows; ++v) {
            float value = sum[lane][i][v];
            if (call.op == Operator::kSwiGLU) value = up[lane][i][v] * portable::activate(value, call.activation);
            portable::narrow(value, static_cast<T*>(call.out) + row * call.width + at + 8 * (lane % 4) + v);
          }
        }
    }
  }
}

}  // namespace

void run_many_block(const Call& call, const ManyPlan& plan, int32_t across, int32_t down) {
  if (call.element == Element::kHalf)
    run<portable::Half>(call, plan, across, down);
  else
    run<portable::BFloat>(call, plan, across, down);
}

}  // namespace flora
