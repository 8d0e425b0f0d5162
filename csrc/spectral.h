// What a backend of the spectral updates gets. No torch. The operation is defined in fastdiff/ops/spectral_update.py.
#pragma once

#include "common.h"

namespace fastdiff {

constexpr uint32_t kSpectralNoise = 4;  // a Philox purpose

// Half spectra [batch, channels, height, columns] of real images, columns = width / 2 + 1, complex numbers interleaved.
struct SpectralUpdate {
  int64_t batch, channels, height, width;
  bool is_double;              // float64 or float32, everything
  void* spectrum;              // the direction's, replaced by the update's; only read where norms are asked for
  const void* drift;           // [1 or channels, height, columns], real or complex
  bool drift_is_complex, drift_per_channel;
  const void* noise_spectrum;  // of the noise; null: drawn from seeds, or none
  const void* gain;            // [1 or channels, height, columns], real: what noise is multiplied by
  bool gain_per_channel;
  const void* row;             // [1 or batch, 2]: factors of direction and noise
  bool row_per_sample;
  const int64_t* seeds;
  const int32_t* stage;        // a word of the noise's counter; null: stage_number
  uint32_t stage_number;
  double* norms;               // [batch, channels, height, 2]: squared norms of each row's two parts, in place of an update

  int64_t columns() const { return width / 2 + 1; }
  int64_t rows() const { return batch * channels * height; }
  // What work is cut into: rows, or pairs of rows k and -k where the noise of one needs that of the other.
  bool in_pairs() const { return seeds || norms; }
  int64_t units() const { return in_pairs() ? batch * channels * (height / 2 + 1) : rows(); }
};

namespace cpu {
// Runs the units [begin, end) of update.units(). Ranges may run in parallel.
void spectral_update(const SpectralUpdate& update, int64_t begin, int64_t end);
}  // namespace cpu

}  // namespace fastdiff
