// What the kernels share. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace fastdiff {

enum class Type { f64, f32, f16, bf16 };

constexpr int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Work is cut into chunks of this many elements, so that a chunk's operands stay in the first cache.
constexpr int64_t kChunk = 512;

namespace cpu {
// The instruction sets that kernels are compiled for; each includes the ones before it.
enum class Target { baseline, avx2, avx512 };
// The best that this machine has; FASTDIFF_CPU_TARGET may ask for less.
Target target();
const char* target_name();
}  // namespace cpu

}  // namespace fastdiff
