// The CPU's kernels in one set of instructions: FLORA_SPACE names it, and the compiler's flags choose it.
#include "dots.h"
#include "grid.h"
#include "host.h"

namespace flora {
namespace FLORA_SPACE {

RunBlock find(const Call& call, const Plan& plan) {
  return call.element == Element::kFloat ? host_block<float>(plan) : host_block<Half>(plan);
}

Dots dots_of_half() { return dots<Half>; }

}  // namespace FLORA_SPACE
}  // namespace flora
