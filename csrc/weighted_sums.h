// What a backend of weighted_sums gets: pointers and sizes. No torch, no CUDA.
// The operation itself is defined in fastdiff/ops/weighted_sums.py.
#pragma once

#include "common.h"

namespace fastdiff {

constexpr int kMaxOperands = 8;
constexpr int kMaxSums = 3;

struct Array {
  void* data;
  Type type;
};

struct WeightedSums {
  int64_t elements;              // of each operand and result, all in one memory order without gaps
  int operands, sums;
  Array operand[kMaxOperands];   // only read
  Array result[kMaxSums];
  bool is_double;                // type of weights and clamp, and of the arithmetic
  const void* weights;           // a row for each sum: the operands', and with clamp one more for the clamped value
  const void* clamp;             // null: none; else lo, hi, a factor for each operand
  bool stream;                   // write past the caches
};

// The last one may be shorter.
inline int64_t chunks(const WeightedSums& sums) { return (sums.elements + kChunk - 1) / kChunk; }

namespace cpu {
// Runs the chunks [begin, end) of chunks(sums). Ranges may run in parallel.
void weighted_sums(const WeightedSums& sums, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace fastdiff
