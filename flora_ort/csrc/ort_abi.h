// The part of ONNX Runtime's C ABI that is used here (MIT License, https://github.com/microsoft/onnxruntime,
// include/onnxruntime/core/session/onnxruntime_c_api.h): no package has the headers, and no version may change the
// places of what was there before. `kApiVersion` is the oldest that has all of it: ONNX Runtime 1.18.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 18;

struct Status;
struct Options;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct Shape;
struct Op;
struct OpAttribute;
using Api = void (*const)();  // a table of functions

struct ApiBase {
  Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

enum ElementType : int { kFloat = 1, kInt64 = 7, kHalf = 10, kBFloat = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kIntAttribute = 1 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

// A function of the table, at its place.
template <int PLACE, typename F>
struct At {
  static F* of(Api* api) { return reinterpret_cast<F*>(api[PLACE]); }
};

using CreateStatus = At<0, Status*(int, const char*)>;
using CreateDomain = At<26, Status*(const char*, Domain**)>;
using AddToDomain = At<27, Status*(Domain*, const struct CustomOp*)>;
using AddDomain = At<28, Status*(Options*, Domain*)>;
using GetTensorData = At<51, Status*(const Value*, void**)>;
using GetDimensionsCount = At<61, Status*(const Shape*, size_t*)>;
using GetDimensions = At<62, Status*(const Shape*, int64_t*, size_t)>;
using GetShape = At<65, Status*(const Value*, Shape**)>;
using GetFloat = At<85, Status*(const KernelInfo*, const char*, float*)>;
using GetInt = At<86, Status*(const KernelInfo*, const char*, int64_t*)>;
using GetString = At<87, Status*(const KernelInfo*, const char*, char*, size_t*)>;
using GetInput = At<90, Status*(const KernelContext*, size_t, const Value**)>;
using GetOutput = At<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>;
using ReleaseStatus = At<93, void(Status*)>;
using ReleaseShape = At<99, void(Shape*)>;
using GetInts = At<163, Status*(const KernelInfo*, const char*, int64_t*, size_t*)>;
using GetStream = At<193, Status*(const KernelContext*, void**)>;
using CreateAttribute = At<211, Status*(const char*, const void*, int, AttributeType, OpAttribute**)>;
using ReleaseAttribute = At<212, void(OpAttribute*)>;
using CreateOp = At<213, Status*(const KernelInfo*, const char*, const char*, int, const char**, const ElementType*, int,
                                 const OpAttribute* const*, int, int, int, Op**)>;
using InvokeOp = At<214, Status*(const KernelContext*, const Op*, const Value* const*, int, Value* const*, int)>;
using ReleaseOp = At<215, void(Op*)>;
using ParallelFor = At<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;

// An operator, as ONNX Runtime asks for it; what stays null it does without.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, Api*, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy_kernel)(void*);
  Characteristic (*get_input_characteristic)(const CustomOp*, size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_same)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_same)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, Api*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  void* infer_shape;
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  void* get_may_inplace;
  void* release_may_inplace;
  void* get_alias_map;
  void* release_alias_map;
};
static_assert(sizeof(CustomOp) == 26 * sizeof(void*), "a table without gaps");

}  // namespace ort
