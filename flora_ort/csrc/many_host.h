// The GPU's kernel for many rows, run on the CPU lane by lane: the same places, and what mma.m16n8k16 makes of them.
#pragma once

#include "many.h"

namespace flora {

// One block of `plan_many`, of `is_many`.
void run_many_block(const Call& call, const ManyPlan& plan, int32_t across, int32_t down);

}  // namespace flora
