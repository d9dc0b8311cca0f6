// SkinnyMatMul as ONNX Runtime knows it.
#pragma once

#include <cstddef>

#include "ort_abi.h"

namespace flora {

// For every provider and dtype that this library was built with.
size_t skinny_count();
const ort::CustomOp* skinny_at(size_t index);

}  // namespace flora
