// What the files that register operators share. These alone see torch: LibTorch's stable ABI, so that one build serves
// torch 2.11 and later. Schemas are defined in Python (fastdiff/ops), which also validates; here only memory safety is
// checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common.h"

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: STD_TORCH_CHECK(false, "fastdiff takes float64, float32, float16 and bfloat16 tensors");
  }
}

// Elements a thread should at least get: below this, waking a second one costs more than it gives.
constexpr int64_t kElementsPerThread = 32 * 1024;
constexpr int64_t kRandomElementsPerThread = 4 * 1024;
// Launches that move more than this many bytes write past the caches.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace fastdiff
