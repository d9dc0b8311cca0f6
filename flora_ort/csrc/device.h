// The GPU's kernels.
#pragma once

#include "call.h"

namespace flora {

// Start a call on a stream; null, or what CUDA says against it.
const char* run_on_device(const Call& call, void* stream);

}  // namespace flora
