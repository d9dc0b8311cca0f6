// The CPU's kernels.
#pragma once

#include <cstdint>

#include "call.h"
#include "plan.h"

namespace flora {

using RunBlock = void (*)(const Call&, const Plan&, int64_t);

// What runs a block of `plan_for_host`, in the widest instructions that this machine has.
RunBlock find_host_block(const Call& call, const Plan& plan);

// What runs a block of `plan_for_device` here, index by index as a GPU does.
RunBlock find_device_block(const Call& call, const Plan& plan);

// Per set of instructions; host_instructions.cpp is compiled once for each.
namespace portable {
RunBlock find(const Call& call, const Plan& plan);
}
namespace avx2 {
RunBlock find(const Call& call, const Plan& plan);
}
namespace avx512 {
RunBlock find(const Call& call, const Plan& plan);
}

}  // namespace flora
