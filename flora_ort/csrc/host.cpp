#include "host.h"

#include "grid.h"

namespace flora {

#if defined(__x86_64__)
namespace {

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

#define FLORA_WIDEST(what) (has_avx512() ? avx512::what : has_avx2() ? avx2::what : portable::what)
#else
#define FLORA_WIDEST(what) portable::what
#endif

RunBlock find_host_block(const Call& call, const Plan& plan) { return FLORA_WIDEST(find)(call, plan); }

Dots find_dots_of_half() { return FLORA_WIDEST(dots_of_half)(); }

RunBlock find_device_block(const Call& call, const Plan& plan) {
  if (call.element == Element::kFloat) return portable::device_block<float>(plan);
  if (call.element == Element::kHalf) return portable::device_block<portable::Half>(plan);
  return portable::device_block<portable::BFloat>(plan);
}

}  // namespace flora
