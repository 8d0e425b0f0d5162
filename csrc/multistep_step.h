// What a backend of multistep_step gets: pointers, sizes and strides. No torch, no CUDA.
// The operation itself is defined in fastdiff/ops/multistep_step.py.
#pragma once

#include "common.h"

namespace fastdiff {

constexpr int kMaxReads = 16;
constexpr int kMaxWrites = 3;
// A row is p, q, lo, hi, c_in, then for each write the weights of x0, output, noise and of each slot read; an index is
// stage, purpose, slots to read, slots to write. fastdiff/ops/row.py is the definition, and a test compares the numbers.
constexpr int kRowHead = 5;    // columns before the first write's
constexpr int kRowEach = 3;    // columns of a write before its slots
constexpr int kIndexHead = 2;  // entries before the slots

struct MultistepStep {
  void* slots;                   // [S, batch, elements], each slot dense; float32 or float64
  int64_t slot_stride;           // elements from slot to slot
  bool is_double;                // type of slots, coefficients, guidance and noise
  int64_t batch, elements;       // elements of one sample
  int64_t channels;              // 1: memory order is logical order; else memory is (positions, channels)
  const void* output;            // null: zero
  int64_t output_stride;         // elements from sample to sample
  Type output_type;
  const void* coefficients;      // rows of kRowHead + writes * (kRowEach + reads)
  bool row_per_sample;
  const int32_t* index;          // of kIndexHead + reads + writes
  const void* guidance;          // null: none; else output holds 2 * batch samples, unconditional ones first
  bool guidance_per_sample;
  const int64_t* seeds;          // null: none
  const void* noise;             // null: none
  int64_t noise_stride;
  void* network_input;           // null: none
  int64_t network_input_stride;
  Type network_input_type;
  int network_input_copies;      // 1, or 2: the second batch samples later
  int reads, writes;
  bool stream;                   // bypass the caches where a slot is written and not read
};

// The last chunk of a sample may be shorter.
inline int64_t chunks_per_sample(const MultistepStep& step) {
  return (step.elements + kChunk - 1) / kChunk;
}

namespace cpu {
// Runs the chunks [begin, end) of batch * chunks_per_sample(step). Ranges may run in parallel.
void multistep_step(const MultistepStep& step, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace fastdiff
