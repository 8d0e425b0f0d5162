// The kernel of a Haar operation, a lane each of haar_lane.h, and its launch. Each operation is compiled in a file of its
// own (haar_split.cu and so on), because together they take long.
//
// Bytes: split, merge, noise 2 N elements, step 3 N, loss N (2 N with its gradient), expand 1.25 N of its result; all are
// bound by memory, those that draw noise by integer and float arithmetic on fast memory.
#pragma once

#pragma nv_diag_suppress 128  // loops over no levels
#include "haar_lane.h"
#include "launch.h"
#include "start.h"

namespace fastdiff::cuda {

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

template <HaarOp op, class S, bool kVector>
auto kernel_for(const Haar& haar) {
  if constexpr (op == HaarOp::expand) {
    return haar_kernel<S, 1, kVector, op>;
  } else {
    switch (Grid(haar).within) {
      case 0: return haar_kernel<S, 0, kVector, op>;
      case 1: return haar_kernel<S, 1, kVector, op>;
      case 2: return haar_kernel<S, 2, kVector, op>;
      default: return haar_kernel<S, 3, kVector, op>;
    }
  }
}

template <HaarOp op>
const char* launch(const Haar& haar, double* losses, void* stream) {
  const auto kernel = haar.is_double       ? kernel_for<op, double, false>(haar)
                      : vectorizable(haar) ? kernel_for<op, float, true>(haar)
                                           : kernel_for<op, float, false>(haar);
  return start(kernel, haar_blocks(haar), kThreads, stream, haar, losses);
}

}  // namespace fastdiff::cuda
