// The Haar kernels: a lane each of haar_lane.h. One launch an operation; the sums of a loss take a second.
//
// Bytes: split, merge, noise 2 N elements, step 3 N, loss N (2 N with its gradient), expand 1.25 N of its result; all are
// bound by memory, those that draw noise by integer and float arithmetic on fast memory.
#pragma nv_diag_suppress 128  // loops over no levels
#include "haar_lane.h"
#include "launch.h"

namespace fastdiff::cuda {

namespace {

struct Warp {
  template <class T>
  __device__ __forceinline__ T swap(T value, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  }
};

template <class S, int K, bool kVector, HaarOp op>
__global__ void __launch_bounds__(kThreads, 2) haar_kernel(const __grid_constant__ Haar haar, double* losses) {
  Warp warp;
  const Grid grid(haar);
  Lane<S, K, kVector, Warp> lane(haar, warp, grid, blockIdx.x, threadIdx.x);
  if (op == HaarOp::split) lane.run_split();
  if (op == HaarOp::merge) lane.run_merge();
  if (op == HaarOp::step) lane.run_step();
  if (op == HaarOp::expand) lane.run_expand();
  if (op == HaarOp::loss) lane.run_loss(losses, blockIdx.x, threadIdx.x);
}

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

template <class S, int K, bool kVector>
void launch_levels(const Haar& haar, HaarOp op, unsigned blocks, double* losses, cudaStream_t stream) {
  switch (op) {
    case HaarOp::split: haar_kernel<S, K, kVector, HaarOp::split><<<blocks, kThreads, 0, stream>>>(haar, losses); break;
    case HaarOp::merge: haar_kernel<S, K, kVector, HaarOp::merge><<<blocks, kThreads, 0, stream>>>(haar, losses); break;
    case HaarOp::step: haar_kernel<S, K, kVector, HaarOp::step><<<blocks, kThreads, 0, stream>>>(haar, losses); break;
    case HaarOp::expand:
      if constexpr (K == 1) haar_kernel<S, 1, kVector, HaarOp::expand><<<blocks, kThreads, 0, stream>>>(haar, losses);
      break;
    case HaarOp::loss: haar_kernel<S, K, kVector, HaarOp::loss><<<blocks, kThreads, 0, stream>>>(haar, losses); break;
  }
}

template <class S, bool kVector>
void launch(const Haar& haar, HaarOp op, unsigned blocks, double* losses, cudaStream_t stream) {
  switch (Grid(haar).within) {
    case 0: return launch_levels<S, 0, kVector>(haar, op, blocks, losses, stream);
    case 1: return launch_levels<S, 1, kVector>(haar, op, blocks, losses, stream);
    case 2: return launch_levels<S, 2, kVector>(haar, op, blocks, losses, stream);
    default: return launch_levels<S, 3, kVector>(haar, op, blocks, losses, stream);
  }
}

}  // namespace

int64_t haar_blocks(const Haar& haar) { return haar.batch * Grid(haar).blocks; }

int64_t haar_losses(const Haar& haar) { return haar_blocks(haar) * kThreads / kWarp; }

const char* haar(const Haar& haar, HaarOp op, double* losses, void* stream) {
  const unsigned blocks = static_cast<unsigned>(haar_blocks(haar));
  const auto on = static_cast<cudaStream_t>(stream);
  if (haar.is_double)
    launch<double, false>(haar, op, blocks, losses, on);
  else if (vectorizable(haar))
    launch<float, true>(haar, op, blocks, losses, on);
  else
    launch<float, false>(haar, op, blocks, losses, on);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* haar_sum(const Haar& haar, const double* losses, void* sums, void* stream) {
  const int64_t warps = haar_losses(haar) / haar.batch;
  const unsigned blocks = static_cast<unsigned>(haar.batch);
  const auto on = static_cast<cudaStream_t>(stream);
  if (haar.is_double)
    sum_kernel<<<blocks, kThreads, 0, on>>>(losses, warps, static_cast<double*>(sums));
  else
    sum_kernel<<<blocks, kThreads, 0, on>>>(losses, warps, static_cast<float*>(sums));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdiff::cuda
