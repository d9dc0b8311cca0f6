// The CPU's kernels in one set of instructions: FLORA_SPACE names it, and the compiler's flags choose it.
#include "grid.h"

namespace flora {
namespace FLORA_SPACE {

RunBlock find(const Call& call, const Plan& plan) {
  return call.element == Element::kFloat ? host_block<float>(plan) : host_block<Half>(plan);
}

}  // namespace FLORA_SPACE
}  // namespace flora
