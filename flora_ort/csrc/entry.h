// What all operators tell ONNX Runtime alike, once for each provider and dtype.
#pragma once

#include <climits>
#include <string>
#include <vector>

#include "asked.h"

namespace flora {

struct Entry : ort::CustomOp {
  Element element;
  bool on_device;
};

inline const Entry* entry_of(const ort::CustomOp* op) { return static_cast<const Entry*>(op); }

// One of an operator, ENTRY made of it; its name, inputs and outputs are the operator's own.
template <typename ENTRY, typename KERNEL>
ENTRY new_entry(Element element, bool on_device, ort::Status* (*create)(const ort::CustomOp*, ort::Api*,
                                                                        const ort::KernelInfo*, void**),
                ort::Status* (*compute)(void*, ort::KernelContext*)) {
  ENTRY entry{};
  entry.version = ort::kApiVersion;
  entry.element = element;
  entry.on_device = on_device;
  entry.get_provider = [](const ort::CustomOp* it) {
    return entry_of(it)->on_device ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  entry.get_output_type = [](const ort::CustomOp* it, size_t) { return type_of(entry_of(it)->element); };
  entry.destroy_kernel = [](void* kernel) { delete static_cast<KERNEL*>(kernel); };
  entry.get_output_characteristic = [](const ort::CustomOp*, size_t index) {
    return index == 0 ? ort::kRequired : ort::kOptional;
  };
  entry.get_input_memory = [](const ort::CustomOp*, size_t) { return 0; };  // where the provider computes
  entry.get_variadic_input_min = entry.get_variadic_output_min = [](const ort::CustomOp*) { return 0; };
  entry.get_variadic_input_same = entry.get_variadic_output_same = [](const ort::CustomOp*) { return 1; };
  entry.create_kernel_v2 = create;
  entry.compute_v2 = compute;
  entry.get_start_version = [](const ort::CustomOp*) { return 1; };
  entry.get_end_version = [](const ort::CustomOp*) { return INT_MAX; };
  return entry;
}

// For every provider and dtype that this library was built with, what `make` makes of them.
template <typename ENTRY, typename MAKE>
void add_entries(std::vector<ENTRY>* to, MAKE make) {
  for (Element element : {Element::kFloat, Element::kHalf}) to->push_back(make(element, false));
#if defined(FLORA_CUDA)
  for (Element element : {Element::kFloat, Element::kHalf, Element::kBFloat}) to->push_back(make(element, true));
#endif
}

// Start a call on the stream of a context.
template <typename CALL>
ort::Status* start_on_device(ort::Api* api, const ort::KernelContext* context, const char* name, const CALL& call,
                             const char* (*run)(const CALL&, void*)) {
  void* stream = nullptr;
  FLORA_TRY(ort::GetStream::of(api)(context, &stream));
  const char* failed = run(call, stream);
  if (failed == nullptr) return nullptr;
  return ort::CreateStatus::of(api)(ort::kFail, (std::string(name) + ": CUDA: " + failed).c_str());
}

}  // namespace flora
