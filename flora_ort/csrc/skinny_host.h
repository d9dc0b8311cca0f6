// The GPU's kernel for few rows, run on the CPU lane by lane: the same places, and what mma.m16n8k16 makes of them.
#pragma once

#include "skinny.h"

namespace flora {

// One block of `plan_skinny`.
void run_skinny_block(const SkinnyCall& call, const SkinnyPlan& plan, int32_t block);

}  // namespace flora
