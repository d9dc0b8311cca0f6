#include "host.h"

#include "grid.h"

namespace flora {

RunBlock find_host_block(const Call& call, const Plan& plan) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c"))
    return avx512::find(call, plan);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return avx2::find(call, plan);
#endif
  return portable::find(call, plan);
}

RunBlock find_device_block(const Call& call, const Plan& plan) {
  if (call.element == Element::kFloat) return portable::device_block<float>(plan);
  if (call.element == Element::kHalf) return portable::device_block<portable::Half>(plan);
  return portable::device_block<portable::BFloat>(plan);
}

}  // namespace flora
