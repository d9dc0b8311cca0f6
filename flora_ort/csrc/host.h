// The CPU's kernels.
#pragma once

#include <cstdint>

#include "call.h"
#include "plan.h"

namespace flora {

using RunBlock = void (*)(const Call&, const Plan&, int64_t);

// What runs a block of `plan_for_host`, in the widest instructions that this machine has.
RunBlock find_host_block(const Call& call, const Plan& plan);

// What multiplies a row of a weight in float16 with rows of x, see dots.h.
using Dots = void (*)(const void* weight, const float* x, int64_t rows, int32_t k, float* out);
Dots find_dots_of_half();

// What runs a block of `plan_for_device` here, index by index as a GPU does.
RunBlock find_device_block(const Call& call, const Plan& plan);

// Per set of instructions; host_instructions.cpp is compiled once for each.
namespace portable {
RunBlock find(const Call& call, const Plan& plan);
Dots dots_of_half();
}
namespace avx2 {
RunBlock find(const Call& call, const Plan& plan);
Dots dots_of_half();
}
namespace avx512 {
RunBlock find(const Call& call, const Plan& plan);
Dots dots_of_half();
}

}  // namespace flora
