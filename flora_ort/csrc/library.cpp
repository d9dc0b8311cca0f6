// What others call: ONNX Runtime, and the tests.
#include <cstdlib>
#include <cstring>

#include "host.h"
#include "many_host.h"
#include "operators.h"
#include "plan.h"
#include "skinny_host.h"
#include "skinny_operator.h"

#define FLORA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int32_t kProcessors = 8;  // of the GPU that is emulated

ort::Domain* domain_of(ort::Api* api, ort::Status** failed) {
  static ort::Domain* domain = nullptr;  // sessions point to it
  if (domain != nullptr) return domain;
  ort::Domain* made = nullptr;
  *failed = ort::CreateDomain::of(api)("flora_ort", &made);
  for (size_t i = 0; *failed == nullptr && i < flora::operator_count(); ++i)
    *failed = ort::AddToDomain::of(api)(made, flora::operator_at(i));
  for (size_t i = 0; *failed == nullptr && i < flora::skinny_count(); ++i)
    *failed = ort::AddToDomain::of(api)(made, flora::skinny_at(i));
  if (*failed == nullptr) domain = made;
  return domain;
}

}  // namespace

// By the name that ONNX Runtime looks for.
FLORA_EXPORT ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) {
    ort::Api* oldest = base->get_api(1);
    return ort::CreateStatus::of(oldest)(ort::kFail, "flora_ort needs ONNX Runtime 1.18 or later");
  }
  ort::Status* failed = nullptr;
  ort::Domain* domain = domain_of(api, &failed);
  return failed != nullptr ? failed : ort::AddDomain::of(api)(options, domain);
}

// Whether there are kernels for the GPU in here.
FLORA_EXPORT int flora_ort_has_cuda() {
#if defined(FLORA_CUDA)
  return 1;
#else
  return 0;
#endif
}

// Run a call on the CPU as the GPU would, thread by thread.
FLORA_EXPORT void flora_ort_emulate(const flora::Call* call) {
  const flora::Plan plan = flora::plan_for_device(*call);
  if (flora::is_many(*call, plan)) {
    const flora::ManyPlan many = flora::plan_many(*call, kProcessors);
    for (int32_t down = 0; down < many.down; ++down)
      for (int32_t across = 0; across < many.across; ++across) flora::run_many_block(*call, many, across, down);
    return;
  }
  const flora::RunBlock run = flora::find_device_block(*call, plan);
  for (int64_t i = 0; i < plan.down * plan.across; ++i) run(*call, plan, i);
}

// Which of the GPU's kernels that is: what it reads at once of columns, of z, how many rows a thread computes, and
// in how many products if it is the one for many rows.
FLORA_EXPORT void flora_ort_plan(const flora::Call* call, int32_t* wide, int32_t* wide_z, int32_t* tile, int32_t* keep,
                                  int32_t* many) {
  const flora::Plan plan = flora::plan_for_device(*call);
  *wide = plan.wide;
  *wide_z = plan.wide_z;
  *tile = plan.tile;
  *keep = plan.keep;
  *many = flora::is_many(*call, plan) ? flora::plan_many(*call, kProcessors).steps : 0;
}

// The same of a call for few rows, on a GPU with so many processors.
FLORA_EXPORT void flora_ort_emulate_skinny(const flora::SkinnyCall* call, int32_t processors) {
  const flora::SkinnyPlan plan = flora::plan_skinny(*call, processors);
  for (int32_t i = 0; i < plan.tiles; ++i) flora::run_skinny_block(*call, plan, i);
}
