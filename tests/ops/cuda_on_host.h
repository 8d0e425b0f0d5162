// The CUDA that csrc/cuda uses, on a CPU: included before a .cu file, it makes C++ of it. Threads of a block are fibres that
// wait for each other at barriers and exchanges; cuda_on_host.cpp checks what a GPU leaves undefined.
#pragma once

#include <cstddef>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
void __syncthreads();

namespace cuda_on_host {
// Runs thread(call) for every thread; they may read the `bytes` of the call.
void launch(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* call, size_t bytes);
// value <- that of the lane whose number differs by these bits.
void exchange(unsigned lanes, void* value, size_t bytes, int bits);
}  // namespace cuda_on_host

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int bits) {
  cuda_on_host::exchange(lanes, &value, sizeof value, bits);
  return value;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {arguments...}};
  const auto thread = [](const void* from) {
    std::apply(static_cast<const Call*>(from)->kernel, static_cast<const Call*>(from)->parameters);
  };
  cuda_on_host::launch(*config, thread, &call, sizeof call);
  return cudaSuccess;  // what a kernel does wrong is told later
}
