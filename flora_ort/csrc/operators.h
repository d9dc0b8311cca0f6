// The operators for unmerged LoRA as ONNX Runtime knows them.
#pragma once

#include <cstddef>

#include "ort_abi.h"

namespace flora {

// Every operator for every provider and dtype that this library was built with.
size_t operator_count();
const ort::CustomOp* operator_at(size_t index);

}  // namespace flora
