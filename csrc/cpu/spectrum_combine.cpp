// The pass between two transforms, on the CPU.
#include "../half_spectrum.h"

#include <cstring>
#include <type_traits>
#include <vector>

#define FASTDIFF_KERNEL "spectrum_combine_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

void spectrum_combine(const SpectrumCombine& combine, int64_t begin, int64_t end) {
  static const auto run = chosen_run();
  run(combine, begin, end);
}

}  // namespace fastdiff::cpu
