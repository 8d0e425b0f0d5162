// A launch, through the runtime's function rather than <<< >>>: all that a kernel needs then is C++, and the tests can run
// it on a CPU (tests/ops/cuda_on_host.h).
#pragma once

#include <cstdint>

namespace fastdiff::cuda {

// Returns null, or what CUDA says.
template <class... Parameters, class... Arguments>
const char* start(
    void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t error = cudaGetLastError();  // of the launch; and no later caller is told it again
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastdiff::cuda
