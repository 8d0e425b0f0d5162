// weighted_sums on the CPU.
#include "../weighted_sums.h"

#define FASTDIFF_KERNEL "weighted_sums_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

void weighted_sums(const WeightedSums& sums, int64_t begin, int64_t end) {
  static const auto run = chosen_run();
  run(sums, begin, end);
}

}  // namespace fastdiff::cpu
