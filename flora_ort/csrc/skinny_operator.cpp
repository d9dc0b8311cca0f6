// SkinnyMatMul(x, W, A?) -> y, z?: y = x W^T and z = x A^T, x [..., k], W [n, k], A [r, k].
//
// Few rows are a kernel of ours. Many are a GEMM, and that is ONNX Runtime's own: its FusedMatMul, invoked here.
#include "skinny_operator.h"

#include <climits>
#include <memory>
#include <new>

#include "arithmetic.h"
#include "asked.h"
#include "entry.h"
#include "host.h"
#include "plan.h"
#include "skinny.h"
#if defined(FLORA_CUDA)
#include "skinny_device.h"
#endif

namespace flora {
namespace {

constexpr char kName[] = "SkinnyMatMul";

struct Kernel {
  ort::Api* api;
  const Entry* entry;
  ort::Op* gemm = nullptr;

  ~Kernel() {
    if (gemm != nullptr) ort::ReleaseOp::of(api)(gemm);
  }
};

// Of float16 ONNX Runtime's CPU has none.
bool has_gemm(const Entry& entry) { return entry.on_device || entry.element == Element::kFloat; }

ort::Status* create(const ort::CustomOp* op, ort::Api* api, const ort::KernelInfo* info, void** made) {
  std::unique_ptr<Kernel> kernel(new (std::nothrow) Kernel{api, entry_of(op)});
  if (!kernel) return ort::CreateStatus::of(api)(ort::kFail, "no memory");
  if (has_gemm(*kernel->entry)) {
    const int64_t transposed = 1;
    ort::OpAttribute* attribute = nullptr;
    FLORA_TRY(ort::CreateAttribute::of(api)("transB", &transposed, 1, ort::kIntAttribute, &attribute));
    const char* constraint = "T";
    const ort::ElementType type = type_of(kernel->entry->element);
    ort::Status* status = ort::CreateOp::of(api)(info, "FusedMatMul", "com.microsoft", 1, &constraint, &type, 1, &attribute,
                                                 1, 2, 1, &kernel->gemm);
    ort::ReleaseAttribute::of(api)(attribute);
    FLORA_TRY(status);
  }
  *made = kernel.release();
  return nullptr;
}

struct Product {
  const Input* matrix;
  ort::Value* value = nullptr;
  void* data = nullptr;

  int32_t rows() const { return matrix->given() ? static_cast<int32_t>(matrix->shape[0]) : 0; }
};

ort::Status* run_gemms(const Kernel& kernel, const ort::KernelContext* context, const Input& x, const Product& y,
                       const Product& z) {
  for (const Product* product : {&y, &z}) {
    if (product->value == nullptr) continue;
    const ort::Value* inputs[] = {x.value, product->matrix->value};
    ort::Value* outputs[] = {product->value};
    FLORA_TRY(ort::InvokeOp::of(kernel.api)(context, kernel.gemm, inputs, 2, outputs, 1));
  }
  return nullptr;
}

// On the CPU in float16: what a batch of rows of W and A makes of all of x.
struct Work {
  const SkinnyCall* call;
  const float* x;
  Dots dots;
  int64_t each, batches;
};

void run_batch(void* data, size_t batch) {
  const Work& work = *static_cast<const Work*>(data);
  const SkinnyCall& call = *work.call;
  const int64_t all = call.n + call.r, from = work.each * static_cast<int64_t>(batch);
  std::vector<float> found(static_cast<size_t>(call.rows));
  for (int64_t row = from; row < from + work.each && row < all; ++row) {
    const bool of_w = row < call.n;
    const int64_t at = of_w ? row : row - call.n, width = of_w ? call.n : call.r;
    const auto* matrix = static_cast<const portable::Half*>(of_w ? call.w : call.a);
    auto* out = static_cast<portable::Half*>(of_w ? call.y : call.z);
    work.dots(matrix + at * call.k, work.x, call.rows, call.k, found.data());
    for (int64_t i = 0; i < call.rows; ++i) portable::narrow(found[static_cast<size_t>(i)], out + i * width + at);
  }
}

ort::Status* run_on_host(ort::Api* api, const ort::KernelContext* context, const SkinnyCall& call) {
  std::vector<float> x(static_cast<size_t>(call.rows * call.k));
  const auto* narrow = static_cast<const portable::Half*>(call.x);
  for (size_t i = 0; i < x.size(); ++i) x[i] = portable::widen(narrow[i]);
  constexpr int64_t kEnough = 1 << 16;  // of products, to be worth a thread
  const int64_t row = call.rows * call.k;
  Work work{&call, x.data(), find_dots_of_half(), row < kEnough ? kEnough / row : 1, 0};
  work.batches = (call.n + call.r + work.each - 1) / work.each;
  return ort::ParallelFor::of(api)(context, run_batch, static_cast<size_t>(work.batches), 0, &work);
}

#if defined(FLORA_CUDA)
bool is_skinny(const SkinnyCall& call) {
  return call.rows <= kSkinnyRows && call.k % kChunk == 0 && call.element != Element::kFloat && aligned(call.x) &&
         aligned(call.w) && aligned(call.a);
}
#endif

ort::Status* compute(void* opaque, ort::KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  ort::Api* api = kernel.api;
  Input x, w, a;
  FLORA_TRY(read_input(api, context, 0, &x));
  FLORA_TRY(read_input(api, context, 1, &w));
  FLORA_TRY(read_input(api, context, 2, &a));
  for (const Input* matrix : {&w, &a}) {
    if (!matrix->given() && matrix == &a) continue;
    if (x.shape.empty() || matrix->shape.size() != 2 || matrix->last() != x.last() || matrix->shape[0] > INT_MAX ||
        x.last() > INT_MAX)
      return refuse(api, std::string(kName) + ": W and A must be [any, columns of x]");
  }
  Product y{&w}, z{&a};
  std::vector<int64_t> shape = x.shape;
  shape.back() = y.rows();
  FLORA_TRY(make_output(api, context, 0, shape, &y.data, &y.value));
  if (a.given()) {
    shape.back() = z.rows();
    FLORA_TRY(make_output(api, context, 1, shape, &z.data, &z.value));
    if (z.value == nullptr) return refuse(api, std::string(kName) + ": A is given, and nobody reads z");
  }
  const SkinnyCall call{kernel.entry->element, x.data,     w.data, a.data, y.data, z.data, x.rows(),
                        static_cast<int32_t>(x.last()), y.rows(), z.rows()};
  if (call.rows == 0) return nullptr;
  if (call.k == 0) return refuse(api, std::string(kName) + ": x is empty");
#if defined(FLORA_CUDA)
  if (kernel.entry->on_device && is_skinny(call))
    return start_on_device(api, context, kName, call, run_skinny_on_device);
#endif
  if (kernel.gemm != nullptr) return run_gemms(kernel, context, x, y, z);
  return run_on_host(api, context, call);
}

Entry make_entry(Element element, bool on_device) {
  Entry entry = new_entry<Entry, Kernel>(element, on_device, create, compute);
  entry.get_name = [](const ort::CustomOp*) -> const char* { return kName; };
  entry.get_input_type = entry.get_output_type;
  entry.get_input_count = [](const ort::CustomOp*) -> size_t { return 3; };
  entry.get_output_count = [](const ort::CustomOp*) -> size_t { return 2; };
  entry.get_input_characteristic = [](const ort::CustomOp*, size_t index) {
    return index < 2 ? ort::kRequired : ort::kOptional;
  };
  return entry;
}

const std::vector<Entry>& entries() {
  static const std::vector<Entry>* const all = [] {  // for as long as the process lives, as sessions may
    auto* made = new std::vector<Entry>;
    add_entries(made, make_entry);
    return made;
  }();
  return *all;
}

}  // namespace

size_t skinny_count() { return entries().size(); }
const ort::CustomOp* skinny_at(size_t index) { return &entries()[index]; }

}  // namespace flora
