// Spectral updates on the CPU.
#include "../spectral.h"

#include <type_traits>
#include <vector>

#define FASTDIFF_KERNEL "spectral_kernel.h"
#include "every_target.h"

namespace fastdiff::cpu {

void spectral_update(const SpectralUpdate& update, int64_t begin, int64_t end) {
  static const auto run = chosen_run();
  run(update, begin, end);
}

}  // namespace fastdiff::cpu
