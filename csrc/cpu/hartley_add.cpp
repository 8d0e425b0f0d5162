// The pass after the last transform, on the CPU.
#include "../half_spectrum.h"

#include <vector>

#define FASTDIFF_KERNEL "hartley_add_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

void hartley_add(const HartleyAdd& add, int64_t begin, int64_t end) {
  static const auto run = chosen_run();
  run(add, begin, end);
}

}  // namespace fastdiff::cpu
