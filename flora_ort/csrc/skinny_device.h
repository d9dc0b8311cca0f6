// The GPU's kernel for few rows.
#pragma once

#include "skinny.h"

namespace flora {

// Start a call on a stream; null, or what CUDA says against it.
const char* run_skinny_on_device(const SkinnyCall& call, void* stream);

}  // namespace flora
