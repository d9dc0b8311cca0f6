// Products of one row of a weight with rows of x, on the CPU.
#pragma once

#include "arithmetic.h"

namespace flora {
namespace FLORA_SPACE {

// out[row] = w . x[row], w [k] in its dtype and x [rows, k] in float32.
template <typename T>
inline void dots(const void* weight, const float* x, int64_t rows, int32_t k, float* out) {
  constexpr int kWide = 16, kTogether = 8;  // numbers of a row, and rows
  const T* w = static_cast<const T*>(weight);
  for (int64_t first = 0; first < rows; first += kTogether) {
    const int count = static_cast<int>(rows - first < kTogether ? rows - first : kTogether);
    float sum[kTogether][kWide] = {};
    int32_t at = 0;
    for (; at + kWide <= k; at += kWide) {
      float wide[kWide];
      load<T, kWide>(w + at, wide);
      for (int row = 0; row < count; ++row)
        for (int i = 0; i < kWide; ++i) sum[row][i] += wide[i] * x[(first + row) * k + at + i];
    }
    for (int row = 0; row < count; ++row) {
      float total = 0.0f;
      for (int i = 0; i < kWide; ++i) total += sum[row][i];
      for (int32_t i = at; i < k; ++i) total += widen(w[i]) * x[(first + row) * k + i];
      out[first + row] = total;
    }
  }
}

}  // namespace FLORA_SPACE
}  // namespace flora
