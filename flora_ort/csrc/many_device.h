// The GPU's kernel for many rows.
#pragma once

#include "call.h"

namespace flora {

// Start a call of `is_many` on a stream; null, or what CUDA says against it.
const char* run_many_on_device(const Call& call, void* stream);

}  // namespace flora
