// sum [16, 8] += A [16, 16] B [16, 8] of a warp, in float32: mma.m16n8k16, compute capability 8 on.
//
// Of lane 4 g + t: a0, a1 are A's columns 2 t and 2 t + 1 in the rows g and g + 8, a2, a3 its columns 2 t + 8 and 2 t + 9;
// b0, b1 are B's column g in the rows 2 t and 2 t + 1, and 2 t + 8 and 2 t + 9; sum has the rows g and g + 8 in the
// columns 2 t and 2 t + 1.
#pragma once

#include <cstdint>

#include "call.h"

namespace flora {

template <Element ELEMENT>
__device__ __forceinline__ void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
#define FLORA_MMA(TYPE)                                                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "       \
      "{%8, %9}, {%0, %1, %2, %3};"                                                                           \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (ELEMENT == Element::kHalf)
    FLORA_MMA("f16");
  else
    FLORA_MMA("bf16");
#undef FLORA_MMA
}

}  // namespace flora
