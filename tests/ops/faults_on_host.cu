// Kernels that do wrong, one a way: what the stand-in for CUDA has to find.
#include "cuda/start.h"

#include <cstring>

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

// No fault: data[0, 256) <- 0, ..., 31, 0, ..., 31 and so on.
__global__ void no_fault(float* data) {
  __shared__ float held[128];
  held[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<float>(threadIdx.x % 32), 31);
  __syncthreads();
  data[blockIdx.x * 128 + threadIdx.x] = held[127 - threadIdx.x];
}

__global__ void lane_returns(float* data) {
  if (threadIdx.x == 37) return;
  data[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void lane_waits_elsewhere(float* data) {
  if (threadIdx.x != 37) data[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  __syncthreads();
}
__global__ void other_exchange(float* data) {
  data[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, threadIdx.x == 37 ? 1 : 2);
}
__global__ void some_lanes(float* data) { data[threadIdx.x] = __shfl_xor_sync(kAll >> 1, 1.0f, 1); }

__global__ void thread_returns(float* data) {
  if (threadIdx.x == 37) return;
  __syncthreads();
  data[threadIdx.x] = 1;
}
__global__ void no_barrier(float* data) {
  __shared__ float held[128];
  held[threadIdx.x] = 1;
  data[threadIdx.x] = held[127 - threadIdx.x];
}
__global__ void exchange_is_no_barrier(float* data) {
  __shared__ float held[128];
  held[threadIdx.x] = 1;
  data[threadIdx.x] = __shfl_xor_sync(kAll, held[threadIdx.x], 1) + held[threadIdx.x ^ 1];
}
__global__ void reads_nothing(float* data) {
  __shared__ float held[128];
  if (threadIdx.x) held[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = held[127 - threadIdx.x];
}
__global__ void late_write(float* data) {
  __shared__ float held[128];
  held[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = held[0];
  held[threadIdx.x] = 2;
}

__global__ void no_blocks(float*) {}
__global__ void same_place(float* data) { data[threadIdx.x / 2] = 1; }
__global__ void other_block(float* data) { data[blockIdx.x * 127 + threadIdx.x] = 1; }
__global__ void reads_past(float* data) { data[threadIdx.x] = data[threadIdx.x + 320]; }
__global__ void writes_past(float* data) { data[threadIdx.x + 192] = 1; }
__global__ void writes_before(float* data) { data[static_cast<int>(threadIdx.x) - 1] = 1; }
__global__ void writes_input(float* data) { data[256 + threadIdx.x] = 1; }
struct alignas(16) Chunk {
  float value[4];
};
__global__ void misaligned(float* data) { *reinterpret_cast<Chunk*>(data + 1) = Chunk{}; }

}  // namespace

#define RUN(kernel, blocks) \
  if (!std::strcmp(name, #kernel)) return fastdiff::cuda::start(kernel, blocks, 128, nullptr, data)

// data: 256 numbers to write, then 128 to read.
extern "C" const char* run_fault(const char* name, float* data) {
  RUN(no_fault, 2);
  RUN(lane_returns, 1);
  RUN(lane_waits_elsewhere, 1);
  RUN(other_exchange, 1);
  RUN(some_lanes, 1);
  RUN(thread_returns, 1);
  RUN(no_barrier, 1);
  RUN(exchange_is_no_barrier, 1);
  RUN(reads_nothing, 1);
  RUN(late_write, 1);
  RUN(same_place, 1);
  RUN(other_block, 2);
  RUN(reads_past, 1);
  RUN(writes_past, 1);
  RUN(writes_before, 1);
  RUN(writes_input, 1);
  RUN(misaligned, 1);
  RUN(no_blocks, 0);
  return "no such kernel";
}
