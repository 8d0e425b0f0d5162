// What the operators call for the Haar ops. One launch an operation; the sums of a loss take a second.
#include "haar_lane.h"
#include "launch.h"
#include "start.h"

namespace fastdiff::cuda {

// haar_kernel.h; haar_split.cu and so on.
template <HaarOp op>
const char* launch(const Haar& haar, double* losses, void* stream);

int64_t haar_blocks(const Haar& haar) { return haar.batch * Grid(haar).blocks; }

int64_t haar_losses(const Haar& haar) { return haar_blocks(haar) * kThreads / kWarp; }

const char* haar(const Haar& haar, HaarOp op, double* losses, void* stream) {
  switch (op) {
    case HaarOp::split: return launch<HaarOp::split>(haar, losses, stream);
    case HaarOp::merge: return launch<HaarOp::merge>(haar, losses, stream);
    case HaarOp::step: return launch<HaarOp::step>(haar, losses, stream);
    case HaarOp::expand: return launch<HaarOp::expand>(haar, losses, stream);
    case HaarOp::loss: return launch<HaarOp::loss>(haar, losses, stream);
  }
  return "no such operation";
}

namespace {

// sums[sample] = its warps' losses: a block a sample, each thread in order, then a tree.
template <class S>
__global__ void __launch_bounds__(kThreads) sum_kernel(const double* losses, int64_t warps, S* sums) {
  __shared__ double part[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < warps; i += kThreads) sum += losses[blockIdx.x * warps + i];
  part[threadIdx.x] = sum;
  for (int half = kThreads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = static_cast<S>(part[0]);
}

}  // namespace

const char* haar_sum(const Haar& haar, const double* losses, void* sums, void* stream) {
  const int64_t warps = haar_losses(haar) / haar.batch;
  if (haar.is_double)
    return start(sum_kernel<double>, haar.batch, kThreads, stream, losses, warps, static_cast<double*>(sums));
  return start(sum_kernel<float>, haar.batch, kThreads, stream, losses, warps, static_cast<float*>(sums));
}

}  // namespace fastdiff::cuda
