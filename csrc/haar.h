// What a backend of the Haar ops gets, and the arithmetic that all backends share. No torch.
// The operations themselves are defined in fastdiff/ops/haar/.
#pragma once

#include "common.h"
#include "philox.h"

namespace fastdiff {

constexpr int kMaxLevels = 5;
constexpr uint32_t kPyramidNoise = 2, kExpansionNoise = 3;  // Philox purposes

// Arrays with a stride for each dimension, in elements.
struct Image {
  void* data;  // null: absent
  Type type;
  int64_t batch, channel, row, column;
};
struct Details {  // three bands V, H, D of one level
  void* data;
  Type type;
  int64_t batch, band, channel, row, column;
};

struct Haar {
  int levels;
  int64_t batch, channels, height, width;  // of the image
  bool is_double;                          // the arithmetic's and the coefficients' type: float64 or float32
  Image image, score, result;              // of that size
  Details details[kMaxLevels];             // finest first
  Image coarse;
  const void* coefficients;                // a row for each level, finest first, and one for the coarse image
  bool row_per_sample;                     // else one table for all
  const int64_t* seeds;                    // null: no noise
  const int32_t* stage;                    // a word of the noise's counter; null: stage_number
  uint32_t stage_number, purpose;
  const void* upstream;                    // of a loss: a factor for each sample's gradient
  bool stream;                             // write past the caches
};

FASTDIFF_INLINE uint32_t stage_of(const Haar& haar) {
  return haar.stage ? static_cast<uint32_t>(haar.stage[0]) : haar.stage_number;
}

// Rows or columns at a level: odd ones are padded by a zero.
FASTDIFF_INLINE int64_t side(int64_t full, int level) { return (full + (int64_t{1} << level) - 1) >> level; }

// Where a level's details begin in a sample's pyramid in logical order (3, C, h, w), ..., (C, h, w): what its noise is
// counted by. Level `levels` + 1 is the coarse image's.
FASTDIFF_INLINE int64_t pyramid_offset(const Haar& haar, int level) {
  int64_t offset = 0;
  for (int j = 1; j < level; ++j) offset += 3 * haar.channels * side(haar.height, j) * side(haar.width, j);
  return offset;
}

inline int64_t pyramid_elements(const Haar& haar) {
  return haar.batch * (pyramid_offset(haar, haar.levels + 1) +
                       haar.channels * side(haar.height, haar.levels) * side(haar.width, haar.levels));
}

// Bands of every level, one after the other in `flat`; each dense, with its channels last where asked.
inline void lay_out(Haar& haar, void* flat, Type type, bool channels_last) {
  char* data = static_cast<char*>(flat);
  for (int level = 1; level <= haar.levels + 1; ++level) {
    const bool coarse = level > haar.levels;
    const int64_t c = haar.channels, bands = coarse ? 1 : 3;
    const int64_t h = side(haar.height, coarse ? haar.levels : level), w = side(haar.width, coarse ? haar.levels : level);
    const int64_t sample = bands * c * h * w, column = channels_last ? bands * c : 1, row = w * column;
    const int64_t channel = channels_last ? 1 : h * w, band = c * channel;
    if (coarse)
      haar.coarse = {data, type, sample, channel, row, column};
    else
      haar.details[level - 1] = {data, type, sample, band, channel, row, column};
    data += haar.batch * sample * size_of(type);
  }
}

template <class S>
struct Quad {
  S low, v, h, d;
};

// One 2 x 2 block a b / c d to its bands, and back: orthonormal, each operation rounded by itself.
template <class S>
FASTDIFF_INLINE Quad<S> split_quad(S a, S b, S c, S d) {
  const S left = a + c, right = b + d, left_difference = a - c, right_difference = b - d;
  return {(left + right) * S(0.5), (left_difference + right_difference) * S(0.5), (left - right) * S(0.5),
          (left_difference - right_difference) * S(0.5)};
}

template <class S>
FASTDIFF_INLINE void merge_quad(const Quad<S>& q, S& a, S& b, S& c, S& d) {
  const S left = q.low + q.h, right = q.low - q.h, left_difference = q.v + q.d, right_difference = q.v - q.d;
  a = (left + left_difference) * S(0.5);
  b = (right + right_difference) * S(0.5);
  c = (left - left_difference) * S(0.5);
  d = (right - right_difference) * S(0.5);
}

enum class HaarOp {
  split,   // image -> details, coarse
  merge,   // details, coarse -> result
  step,    // image, score, noise -> result
  expand,  // coarse, noise -> result; one level
  loss,    // image, noise -> a number; with `result` its gradient
};

namespace cpu {
// Work is cut into tiles, each of at most so many elements of the image.
int64_t haar_tiles(const Haar& haar);
int64_t haar_tile_elements(const Haar& haar);
// Runs the tiles [begin, end) of haar_tiles(haar). Ranges may run in parallel. losses: a number for each tile of all, or null.
void haar(const Haar& haar, HaarOp op, int64_t begin, int64_t end, double* losses);
}  // namespace cpu

}  // namespace fastdiff
