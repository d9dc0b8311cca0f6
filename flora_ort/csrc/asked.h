// What ONNX Runtime asks a kernel for: inputs by number, and outputs to be made.
#pragma once

#include <string>
#include <vector>

#include "call.h"
#include "ort_abi.h"

namespace flora {

inline ort::ElementType type_of(Element element) {
  return element == Element::kFloat ? ort::kFloat : element == Element::kHalf ? ort::kHalf : ort::kBFloat;
}

inline ort::Status* refuse(ort::Api* api, const std::string& why) {
  return ort::CreateStatus::of(api)(ort::kInvalidArgument, why.c_str());
}

#define FLORA_TRY(status) \
  if (ort::Status* failed = (status)) return failed

struct Input {
  const void* data = nullptr;  // null: it is not there
  const ort::Value* value = nullptr;
  std::vector<int64_t> shape;

  int64_t last() const { return shape.empty() ? 1 : shape.back(); }
  int64_t rows() const {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    return rows;
  }
  bool given() const { return !shape.empty(); }
};

inline ort::Status* read_input(ort::Api* api, const ort::KernelContext* context, size_t index, Input* input) {
  const ort::Value* value = nullptr;
  FLORA_TRY(ort::GetInput::of(api)(context, index, &value));
  if (value == nullptr) return nullptr;
  ort::Shape* shape = nullptr;
  FLORA_TRY(ort::GetShape::of(api)(value, &shape));
  size_t count = 0;
  ort::Status* status = ort::GetDimensionsCount::of(api)(shape, &count);
  if (status == nullptr) {
    input->shape.resize(count);
    status = ort::GetDimensions::of(api)(shape, input->shape.data(), count);
  }
  ort::ReleaseShape::of(api)(shape);
  FLORA_TRY(status);
  void* data = nullptr;
  FLORA_TRY(ort::GetTensorData::of(api)(value, &data));
  input->data = data;
  input->value = value;
  return nullptr;
}

inline ort::Status* make_output(ort::Api* api, ort::KernelContext* context, size_t index, const std::vector<int64_t>& shape,
                                void** data, ort::Value** made = nullptr) {
  ort::Value* value = nullptr;
  FLORA_TRY(ort::GetOutput::of(api)(context, index, shape.data(), shape.size(), &value));
  if (made != nullptr) *made = value;
  if (value == nullptr) return nullptr;  // nobody reads it
  return ort::GetTensorData::of(api)(value, data);
}

}  // namespace flora
