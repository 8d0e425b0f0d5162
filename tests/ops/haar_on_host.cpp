// What the test of the Haar ops calls of csrc/cuda/launch.h.
#include "cuda/haar_lane.h"
#include "cuda/launch.h"

using namespace fastdiff;

extern "C" {

size_t haar_bytes() { return sizeof(Haar); }
bool haar_aligned(const Haar* haar) { return cuda::vectorizable(*haar); }
int64_t haar_blocks(const Haar* haar) { return cuda::haar_blocks(*haar); }
int64_t haar_losses(const Haar* haar) { return cuda::haar_losses(*haar); }
const char* haar(const Haar* haar, int op, double* losses) { return cuda::haar(*haar, HaarOp(op), losses, nullptr); }
const char* haar_sum(const Haar* haar, const double* losses, void* sums) {
  return cuda::haar_sum(*haar, losses, sums, nullptr);
}
}
