// What a backend of the passes over half spectra gets. No torch. They are defined in fastdiff/ops/half_spectrum.py.
//
// A half spectrum is [images, height, columns] of real images, columns = width / 2 + 1, complex numbers interleaved; a
// Hartley spectrum is [images, height, width], real: real less imaginary part of the whole spectrum.
#pragma once

#include <cmath>

#include "common.h"

namespace fastdiff {

constexpr uint32_t kSpectralNoise = 4;  // a Philox purpose

// hartley <- that of row_0 drift spectrum + row_1 gain noise; images = batch * channels.
struct SpectrumCombine {
  int64_t batch, channels, height, width;
  bool is_double;              // float64 or float32, everything
  const void* spectrum;        // of the direction
  void* hartley;
  const void* drift;           // [1 or channels, height, columns], real or complex
  bool drift_is_complex, drift_per_channel;
  const void* noise_spectrum;  // null: drawn from seeds, or none
  const void* gain;            // [1 or channels, height, columns], real: what noise is multiplied by
  bool gain_per_channel;
  const void* row;             // [1 or batch, 2]
  bool row_per_sample;
  const int64_t* seeds;
  const int32_t* stage;        // a word of the noise's counter; null: stage_number
  uint32_t stage_number;
  double* squares;             // [batch, channels, height, 2]: squared norms of each row's two parts, in place of a result
  void* drawn;                 // with squares and seeds, the noise too: like spectrum, over its unit()

  int64_t columns() const { return width / 2 + 1; }
  int64_t rows() const { return batch * channels * height; }
  double unit() const { return std::sqrt(static_cast<double>(height) * static_cast<double>(width) / 2); }
  // What work is cut into: rows, or pairs of rows k and -k where the noise of one needs that of the other.
  bool in_pairs() const { return seeds || squares; }
  int64_t units() const { return in_pairs() ? batch * channels * (height / 2 + 1) : rows(); }
};

// y <- x + the Hartley spectrum of `spectrum`; work is cut into rows. y may be x, or shares no memory with it.
struct HartleyAdd {
  int64_t images, channels, height, width;
  bool is_double;        // the spectrum
  const void* spectrum;
  Type type;             // of x and y
  const void* x;         // null: zeros
  void* y;
  int64_t x_strides[4], y_strides[4];  // of samples, channels, rows, columns

  int64_t rows() const { return images * height; }
};

namespace cpu {
// Run the units [begin, end). Ranges may run in parallel.
void spectrum_combine(const SpectrumCombine& combine, int64_t begin, int64_t end);
void hartley_add(const HartleyAdd& add, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace fastdiff
