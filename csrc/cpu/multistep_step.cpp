// multistep_step on the CPU.
#include "../multistep_step.h"

#define FASTDIFF_KERNEL "multistep_step_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

void multistep_step(const MultistepStep& step, int64_t begin, int64_t end) {
  static const auto run = chosen_run();
  run(step, begin, end);
}

}  // namespace fastdiff::cpu
