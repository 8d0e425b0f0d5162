// What one thread of the Haar kernels does. Plain C++ but for the exchange with its warp, which the kernel gives
// (haar_kernel.h).
//
// A lane holds a tile of 8 columns and 2, 2, 4 or 8 rows in registers, for 0, 1, 2 or 3 levels within the lane. Levels 4
// and 5 combine the low values of 2 x 2 and 4 x 4 lanes. In place: a block's low, H, V and D take the places of a, b, c
// and d, within a lane and among lanes.
#pragma once

#include "../cpu/convert.h"
#include "../haar.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace fastdiff::cuda {

constexpr int kColumns = 8;
constexpr int kThreads = 128;
constexpr int kWarp = 32;

FASTDIFF_INLINE int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step; }

// How tiles are dealt to lanes: groups of 2^across x 2^across tiles, blocks that belong to one sample each.
struct Grid {
  int within, across;  // levels
  int64_t down, right, blocks;  // groups of a plane; blocks of a sample

  FASTDIFF_INLINE explicit Grid(const Haar& haar) {
    within = haar.levels < 3 ? haar.levels : 3;
    across = haar.levels - within;
    const int rows = within == 0 ? 2 : 1 << within;
    down = up(haar.height, rows << across);
    right = up(haar.width, kColumns << across);
    blocks = up(haar.channels * down * right << 2 * across, kThreads);
  }
};

// Values of a band that lie side by side: `count` of them, in the tile from (row, column) on, `step` columns apart.
struct Run {
  int level, band, row, column, step, count;  // band 3: low
};

// Where a run is in its band; table: its row of the coefficients.
struct Where {
  int level, band, table;
  int row, column;
};

template <int kBytes>
struct alignas(kBytes) Chunk {
  uint8_t byte[kBytes];
};

FASTDIFF_INLINE float to_wide(float value, float) { return value; }
FASTDIFF_INLINE float to_wide(cpu::BFloat16 value, float) { return cpu::widen(value); }
FASTDIFF_INLINE float to_wide(cpu::Half value, float) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  return cpu::widen(value);
#endif
}
FASTDIFF_INLINE float to_wide(double value, float) { return static_cast<float>(value); }
template <class T>
FASTDIFF_INLINE double to_wide(T value, double) { return to_wide(value, 0.0f); }
FASTDIFF_INLINE double to_wide(double value, double) { return value; }

template <class S, class T>
FASTDIFF_INLINE void to_narrow(S value, T& to) { cpu::narrow(value, to); }
FASTDIFF_INLINE void to_narrow(float value, cpu::Half& to) {
#ifdef __CUDA_ARCH__
  to.bits = __half_as_ushort(__float2half_rn(value));
#else
  cpu::narrow(value, to);
#endif
}

// The Philox words of an element's block.
FASTDIFF_INLINE void normal_words(uint64_t seed, uint32_t stage, uint32_t purpose, int64_t element, uint32_t word[4]) {
  const uint64_t block = static_cast<uint64_t>(element) / 4;
  word[0] = static_cast<uint32_t>(block);
  word[1] = static_cast<uint32_t>(block >> 32);
  word[2] = stage;
  word[3] = purpose;
  philox4x32(word, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Normals of the elements [first, first + count) of a sample. aligned: first is a multiple of count (4, 2 or 1).
FASTDIFF_INLINE void normal_run(
    uint64_t seed, uint32_t stage, uint32_t purpose, int64_t first, int count, bool aligned, float to[4]) {
  FASTDIFF_UNROLL
  for (int k = 0; k < 4; ++k) to[k] = 0;
  if (aligned && count > 1) {
    uint32_t word[4];
    normal_words(seed, stage, purpose, first, word);
    if (count == 4) {
      const Pair a = box_muller(word[0], word[1]), b = box_muller(word[2], word[3]);
      to[0] = a.first;
      to[1] = a.second;
      to[2] = b.first;
      to[3] = b.second;
    } else {
      const bool later = first & 2;
      const Pair a = box_muller(later ? word[2] : word[0], later ? word[3] : word[1]);
      to[0] = a.first;
      to[1] = a.second;
    }
    return;
  }
  FASTDIFF_ROLLED
  for (int i = 0; i < count; ++i) {  // rolled: the code is long; so `to` may not be indexed by i
    uint32_t word[4];
    normal_words(seed, stage, purpose, first + i, word);
    const bool later = (first + i) & 2;
    const Pair a = box_muller(later ? word[2] : word[0], later ? word[3] : word[1]);
    const float normal = (first + i) & 1 ? a.second : a.first;
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) to[k] = k == i ? normal : to[k];
  }
}

// S: the arithmetic's type. K: levels within the lane. kVector: rows of 8 columns are whole and aligned (vectorizable).
// Warp: S swap(S value, int mask), the value of the lane whose number differs by these bits.
template <class S, int K, bool kVector, class Warp>
struct Lane {
  static constexpr int kRows = K == 0 ? 2 : 1 << K;
  static constexpr int kPartLevels = K < 2 ? K : K - 1;
  static constexpr int kPart = K == 0 ? 2 : 1 << kPartLevels;  // rows of a second operand that are held at a time
  using Tile = S[kRows][kColumns];

  const Haar& haar;
  Warp& warp;
  int across, bits;  // levels across lanes; the lane's place in its group: x0 | y0 << 1 | x1 << 2 | y1 << 3
  int sample, channel, y, x;  // of the tile's first element
  bool inside;
  Tile v;  // the image, then its bands

  FASTDIFF_INLINE Lane(const Haar& haar, Warp& warp, const Grid& grid, int64_t block, int thread)
      : haar(haar), warp(warp), across(K == 3 ? grid.across : 0) {
    sample = static_cast<int>(block / grid.blocks);
    const int64_t lane = (block - sample * grid.blocks) * kThreads + thread;
    const int64_t group = lane >> 2 * across;
    bits = static_cast<int>(lane & ((1 << 2 * across) - 1));
    channel = static_cast<int>(group / (grid.down * grid.right));
    const int64_t place = group - channel * grid.down * grid.right, below = place / grid.right;
    const int tile_x = (bits & 1) | (bits >> 1 & 2), tile_y = (bits >> 1 & 1) | (bits >> 2 & 2);
    y = (static_cast<int>(below << across) + tile_y) * kRows;
    x = (static_cast<int>((place - below * grid.right) << across) + tile_x) * kColumns;
    inside = channel < haar.channels && y < haar.height && x < haar.width;
  }

  // -- a tile in memory ---------------------------------------------------------------------------------------------

  template <class T>
  FASTDIFF_INLINE void load_as(const Image& image, Tile& to, int first, int last) const {
    const T* from = static_cast<const T*>(image.data) + sample * image.batch + channel * image.channel + y * image.row +
                    x * image.column;
    FASTDIFF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r < first || r >= last) continue;
      const bool here = inside && y + r < haar.height;
      alignas(16) T row[kColumns];
      if (kVector && here) {
        FASTDIFF_UNROLL
        for (int i = 0; i < int(sizeof(row) / 16); ++i)
          reinterpret_cast<Chunk<16>*>(row)[i] = reinterpret_cast<const Chunk<16>*>(from + r * image.row)[i];
      }
      FASTDIFF_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (kVector)
          to[r][c] = here ? to_wide(row[c], S{}) : S{0};
        else
          to[r][c] = here && x + c < haar.width ? to_wide(from[r * image.row + c * image.column], S{}) : S{0};
      }
    }
  }
  // Rows [first, last) of the tile.
  FASTDIFF_INLINE void load(const Image& image, Tile& to, int first = 0, int last = kRows) const {
    switch (image.type) {
      case Type::f64: if (!kVector) load_as<double>(image, to, first, last); break;
      case Type::f32: load_as<float>(image, to, first, last); break;
      case Type::f16: load_as<cpu::Half>(image, to, first, last); break;
      case Type::bf16: load_as<cpu::BFloat16>(image, to, first, last); break;
    }
  }

  template <class T>
  FASTDIFF_INLINE void store_as(const Image& image) const {
    T* to = static_cast<T*>(image.data) + sample * image.batch + channel * image.channel + y * image.row + x * image.column;
    FASTDIFF_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!inside || y + r >= haar.height) continue;
      alignas(16) T row[kColumns];
      FASTDIFF_UNROLL
      for (int c = 0; c < kColumns; ++c) to_narrow(v[r][c], row[c]);
      if (kVector) {
        FASTDIFF_UNROLL
        for (int i = 0; i < int(sizeof(row) / 16); ++i)
          reinterpret_cast<Chunk<16>*>(to + r * image.row)[i] = reinterpret_cast<const Chunk<16>*>(row)[i];
        continue;
      }
      FASTDIFF_UNROLL
      for (int c = 0; c < kColumns; ++c)
        if (x + c < haar.width) to[r * image.row + c * image.column] = row[c];
    }
  }
  FASTDIFF_INLINE void store(const Image& image) const {
    switch (image.type) {
      case Type::f64: if (!kVector) store_as<double>(image); break;
      case Type::f32: store_as<float>(image); break;
      case Type::f16: store_as<cpu::Half>(image); break;
      case Type::bf16: store_as<cpu::BFloat16>(image); break;
    }
  }

  // -- split and merge ----------------------------------------------------------------------------------------------

  // Levels [from, to) within the lane of the rows [first, last).
  FASTDIFF_INLINE void split_within(Tile& tile, int from, int to, int first, int last) const {
    FASTDIFF_UNROLL
    for (int level = 0; level < K; ++level) {
      if (level < from || level >= to) continue;
      FASTDIFF_UNROLL
      for (int r = 0; r < kRows; r += 2 << level) {
        if (r < first || r >= last) continue;
        FASTDIFF_UNROLL
        for (int c = 0; c < kColumns; c += 2 << level) {
          const int s = 1 << level;
          const Quad<S> q = split_quad(tile[r][c], tile[r][c + s], tile[r + s][c], tile[r + s][c + s]);
          tile[r][c] = q.low;
          tile[r][c + s] = q.h;
          tile[r + s][c] = q.v;
          tile[r + s][c + s] = q.d;
        }
      }
    }
  }
  FASTDIFF_INLINE void split_across(S& low) const {
    for (int level = 0; level < across; ++level) {
      S a, b, c, d;
      gather(low, level, a, b, c, d);
      const Quad<S> q = split_quad(a, b, c, d);
      keep(low, level, q.low, q.h, q.v, q.d);
    }
  }
  FASTDIFF_INLINE void split() {
    split_within(v, 0, K, 0, kRows);
    split_across(v[0][0]);
  }

  FASTDIFF_INLINE void merge() {
    for (int level = across - 1; level >= 0; --level) {
      Quad<S> q;
      S a, b, c, d;
      gather(v[0][0], level, q.low, q.h, q.v, q.d);
      merge_quad(q, a, b, c, d);
      keep(v[0][0], level, a, b, c, d);
    }
    FASTDIFF_UNROLL
    for (int level = K - 1; level >= 0; --level) {
      FASTDIFF_UNROLL
      for (int r = 0; r < kRows; r += 2 << level) {
        FASTDIFF_UNROLL
        for (int c = 0; c < kColumns; c += 2 << level) {
          const int s = 1 << level;
          const Quad<S> q{v[r][c], v[r + s][c], v[r][c + s], v[r + s][c + s]};
          merge_quad(q, v[r][c], v[r][c + s], v[r + s][c], v[r + s][c + s]);
        }
      }
    }
  }

  // The four values of a block of lanes, 2^level lanes apart: at (0, 0), (1, 0), (0, 1) and (1, 1) in x, y.
  FASTDIFF_INLINE void gather(S value, int level, S& a, S& b, S& c, S& d) const {
    const int mask_x = 1 << 2 * level, mask_y = 2 << 2 * level;
    const bool at_x = bits & mask_x, at_y = bits & mask_y;
    const S beside = warp.swap(value, mask_x), left = at_x ? beside : value, right = at_x ? value : beside;
    const S other_left = warp.swap(left, mask_y), other_right = warp.swap(right, mask_y);
    a = at_y ? other_left : left;
    b = at_y ? other_right : right;
    c = at_y ? left : other_left;
    d = at_y ? right : other_right;
  }
  // Lanes that are part of no finer block take theirs of the four.
  FASTDIFF_INLINE void keep(S& value, int level, S a, S b, S c, S d) const {
    if (bits & ((1 << 2 * level) - 1)) return;
    const bool at_x = bits & 1 << 2 * level, at_y = bits & 2 << 2 * level;
    value = at_y ? (at_x ? d : c) : (at_x ? b : a);
  }

  // -- bands --------------------------------------------------------------------------------------------------------

  // Details of the levels [from, to) within the lane, of the rows [first, last).
  template <class Visit>
  FASTDIFF_INLINE void each_detail(int from, int to, int first, int last, Visit visit) const {
    FASTDIFF_UNROLL
    for (int level = 0; level < K; ++level) {
      if (level < from || level >= to) continue;
      FASTDIFF_UNROLL
      for (int r = 0; r < kRows; r += 2 << level) {
        if (r < first || r >= last) continue;
        const int s = 1 << level;
        visit(Run{level + 1, 0, r + s, 0, 2 * s, 4 >> level});
        visit(Run{level + 1, 1, r, s, 2 * s, 4 >> level});
        visit(Run{level + 1, 2, r + s, s, 2 * s, 4 >> level});
      }
    }
  }
  template <class Visit>
  FASTDIFF_INLINE void each_low(Visit visit) const {
    FASTDIFF_UNROLL
    for (int r = 0; r < kRows; r += 1 << K) {
      FASTDIFF_UNROLL
      for (int c = 0; c < kColumns; c += 4 << K) visit(Run{K, 3, r, c, 1 << K, K == 3 ? 1 : K == 2 ? 2 : 4});
    }
  }
  template <class Visit>
  FASTDIFF_INLINE void each_run(Visit visit) const {
    each_detail(0, K, 0, kRows, visit);
    each_low(visit);
  }

  FASTDIFF_INLINE Where where(const Run& run) const {
    Where w{run.level, run.band, run.band == 3 ? haar.levels : run.level - 1, 0, 0};
    if (run.band == 3 && across > 0) {  // a band of the levels among lanes, or the coarse image
      const int first = bits & 3, second = bits >> 2 & 3;
      const int place = first ? first : second;  // 1: H, 2: V, 3: D
      w.level = first ? 4 : haar.levels;
      if (place) {
        w.band = place == 1 ? 1 : place == 2 ? 0 : 2;
        w.table = w.level - 1;
      }
    }
    w.row = (y + run.row) >> w.level;
    w.column = (x + run.column) >> w.level;
    return w;
  }

  // A lane beyond the edge may hold a band of its group.
  FASTDIFF_INLINE bool is_there(const Where& w, int i) const {
    return channel < haar.channels && w.row < side(haar.height, w.level) && w.column + i < side(haar.width, w.level);
  }

  template <class T>
  FASTDIFF_INLINE T* band_data(const Where& w, int64_t& column) const {
    if (w.band == 3) {
      const Image& c = haar.coarse;
      column = c.column;
      return static_cast<T*>(c.data) + sample * c.batch + channel * c.channel + w.row * c.row + w.column * c.column;
    }
    const Details& d = haar.details[w.level - 1];
    column = d.column;
    return static_cast<T*>(d.data) + sample * d.batch + w.band * d.band + channel * d.channel + w.row * d.row +
           w.column * d.column;
  }

  template <class T>
  FASTDIFF_INLINE void store_run(const Run& run) {
    const Where w = where(run);
    int64_t column;
    T* to = band_data<T>(w, column);
    alignas(16) T made[4];
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < run.count) to_narrow(v[run.row][run.column + i * run.step], made[i]);
    if (kVector) {
      if (!is_there(w, 0)) return;
      if (run.count == 4) *reinterpret_cast<Chunk<4 * sizeof(T)>*>(to) = *reinterpret_cast<Chunk<4 * sizeof(T)>*>(made);
      if (run.count == 2) *reinterpret_cast<Chunk<2 * sizeof(T)>*>(to) = *reinterpret_cast<Chunk<2 * sizeof(T)>*>(made);
      if (run.count == 1) *to = made[0];
      return;
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < run.count && is_there(w, i)) to[i * column] = made[i];
  }
  template <class T>
  FASTDIFF_INLINE void load_run(const Run& run) {
    const Where w = where(run);
    int64_t column;
    const T* from = band_data<T>(w, column);
    alignas(16) T made[4];
    if (kVector && is_there(w, 0)) {
      if (run.count == 4)
        *reinterpret_cast<Chunk<4 * sizeof(T)>*>(made) = *reinterpret_cast<const Chunk<4 * sizeof(T)>*>(from);
      if (run.count == 2)
        *reinterpret_cast<Chunk<2 * sizeof(T)>*>(made) = *reinterpret_cast<const Chunk<2 * sizeof(T)>*>(from);
      if (run.count == 1) made[0] = *from;
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= run.count) continue;
      S& value = v[run.row][run.column + i * run.step];
      if (kVector)
        value = is_there(w, 0) ? to_wide(made[i], S{}) : S{0};
      else
        value = is_there(w, i) ? to_wide(from[i * column], S{}) : S{0};
    }
  }
  template <class T>
  FASTDIFF_INLINE void store_bands() {
    each_run([&](const Run& run) { store_run<T>(run); });
  }
  template <class T>
  FASTDIFF_INLINE void load_bands() {
    each_run([&](const Run& run) { load_run<T>(run); });
  }

  // -- what is done to bands ----------------------------------------------------------------------------------------

  FASTDIFF_INLINE const S* table(const Where& w, int columns) const {
    const int64_t first = haar.row_per_sample ? sample * (haar.levels + 1) : 0;
    return static_cast<const S*>(haar.coefficients) + (first + w.table) * columns;
  }

  FASTDIFF_INLINE void noise(const Run& run, const Where& w, float z[4]) const {
    const int64_t height = side(haar.height, w.level), width = side(haar.width, w.level);
    const int64_t plane = w.band == 3 ? channel : w.band * haar.channels + channel;
    const int64_t first =
        pyramid_offset(haar, w.band == 3 ? haar.levels + 1 : w.level) + (plane * height + w.row) * width + w.column;
    normal_run(haar.seeds[sample], stage_of(haar), haar.purpose, first, run.count, kVector, z);
  }

  // run <- c_x run + c_s score
  FASTDIFF_INLINE void combine(const Run& run, const Tile* score) {
    const Where w = where(run);
    if (!is_there(w, 0)) return;
    const S* const c = table(w, score ? 3 : 2);
    const S by_x = c[0], by_score = score ? c[1] : S{0};
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= run.count) continue;
      S& value = v[run.row][run.column + i * run.step];
      S total = 0;
      if (by_x != 0) total = total + by_x * value;
      if (by_score != 0) total = total + by_score * (*score)[run.row][run.column + i * run.step];
      value = total;
    }
  }
  // run <- run + c_z z, when the score needs no registers any more.
  FASTDIFF_INLINE void add_noise(const Run& run) {
    const Where w = where(run);
    if (!is_there(w, 0)) return;
    const int columns = haar.score.data ? 3 : 2;
    const S by_z = table(w, columns)[columns - 1];
    if (by_z == 0) return;
    float z[4];
    noise(run, w, z);
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= run.count) continue;
      S& value = v[run.row][run.column + i * run.step];
      value = value + by_z * static_cast<S>(z[i]);
    }
  }
  FASTDIFF_INLINE void add_noise() {
    if (haar.seeds) each_run([&](const Run& run) { add_noise(run); });
  }
  // A part of the score is read, split and used before the next, so that two tiles never have to be held.
  FASTDIFF_INLINE void combine_with_score() {
    Tile score;
    const auto visit = [&](const Run& run) { combine(run, &score); };
    FASTDIFF_UNROLL
    for (int r = 0; r < kRows; r += kPart) {
      load(haar.score, score, r, r + kPart);
      split_within(score, 0, kPartLevels, r, r + kPart);
      each_detail(0, kPartLevels, r, r + kPart, visit);
    }
    split_within(score, kPartLevels, K, 0, kRows);
    split_across(score[0][0]);
    each_detail(kPartLevels, K, 0, kRows, visit);
    each_low(visit);
  }

  // block <- 2 w f (f block + z) upstream; returns the sum of w (f block + z)^2
  FASTDIFF_INLINE double loss() {
    double total = 0;
    const S factor = haar.result.data ? static_cast<const S*>(haar.upstream)[sample] : S{0};
    each_run([&](const Run& run) {
      const Where w = where(run);
      const S* const c = table(w, 2);
      const bool counts = is_there(w, 0) && c[0] != 0;
      float z[4] = {};
      if (counts) noise(run, w, z);
      double squares = 0;
      FASTDIFF_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (i >= run.count) continue;
        S& value = v[run.row][run.column + i * run.step];
        const S error = counts && is_there(w, i) ? c[1] * value + static_cast<S>(z[i]) : S{0};
        squares += static_cast<double>(error) * error;
        value = counts ? 2 * c[0] * c[1] * factor * error : S{0};
      }
      if (counts) total += c[0] * squares;
    });
    return total;
  }

  // -- the operations -----------------------------------------------------------------------------------------------

  FASTDIFF_INLINE void run_split() {
    load(haar.image, v);
    split();
    switch (haar.coarse.type) {
      case Type::f64: if (!kVector) store_bands<double>(); break;
      case Type::f32: store_bands<float>(); break;
      case Type::f16: store_bands<cpu::Half>(); break;
      case Type::bf16: store_bands<cpu::BFloat16>(); break;
    }
  }
  FASTDIFF_INLINE void run_merge() {
    switch (haar.coarse.type) {
      case Type::f64: if (!kVector) load_bands<double>(); break;
      case Type::f32: load_bands<float>(); break;
      case Type::f16: load_bands<cpu::Half>(); break;
      case Type::bf16: load_bands<cpu::BFloat16>(); break;
    }
    merge();
    store(haar.result);
  }
  FASTDIFF_INLINE void run_step() {
    load(haar.image, v);
    split();
    if (haar.score.data)
      combine_with_score();
    else
      each_run([&](const Run& run) { combine(run, nullptr); });
    add_noise();
    merge();
    store(haar.result);
  }
  // One level: the coarse image in, details from nothing.
  template <class T>
  FASTDIFF_INLINE void load_coarse() {
    each_run([&](const Run& run) {
      if (run.band == 3) return load_run<T>(run);
      FASTDIFF_UNROLL
      for (int i = 0; i < 4; ++i)
        if (i < run.count) v[run.row][run.column + i * run.step] = S{0};
    });
  }
  FASTDIFF_INLINE void run_expand() {
    switch (haar.coarse.type) {
      case Type::f64: if (!kVector) load_coarse<double>(); break;
      case Type::f32: load_coarse<float>(); break;
      case Type::f16: load_coarse<cpu::Half>(); break;
      case Type::bf16: load_coarse<cpu::BFloat16>(); break;
    }
    each_run([&](const Run& run) { combine(run, nullptr); });
    add_noise();
    merge();
    store(haar.result);
  }
  // losses: a number for each warp, or null.
  FASTDIFF_INLINE void run_loss(double* losses, int64_t block, int thread) {
    load(haar.image, v);
    split();
    double total = loss();
    if (losses)
      for (int mask = kWarp / 2; mask; mask /= 2) total += warp.swap(total, mask);
    if (losses && thread % kWarp == 0) losses[(block * kThreads + thread) / kWarp] = total;
    if (!haar.result.data) return;
    merge();
    store(haar.result);
  }
};

// The layout that kVector asks for.
inline bool vectorizable(const Haar& haar) {
  if (haar.is_double || haar.width % kColumns) return false;
  const auto fits = [](const void* data, Type type, int64_t column, int64_t together, int64_t a, int64_t b, int64_t c, int64_t d) {
    return !data || (column == 1 && type != Type::f64 && a % together == 0 && b % together == 0 && c % together == 0 &&
                     d % together == 0 && reinterpret_cast<uintptr_t>(data) % (together * size_of(type)) == 0);
  };
  const auto image = [&](const Image& i, int64_t together) {
    return fits(i.data, i.type, i.column, together, i.batch, i.channel, i.row, 0);
  };
  // A tile of half precision is a chunk of 16 bytes a row, one of float32 two.
  const auto row = [](const Image& i) { return i.data && size_of(i.type) == 2 ? int64_t{8} : int64_t{4}; };
  bool all = image(haar.image, row(haar.image)) && image(haar.score, row(haar.score)) && image(haar.result, row(haar.result)) &&
             image(haar.coarse, haar.levels > 2 ? 1 : 4 >> (haar.levels ? haar.levels - 1 : 0));
  for (int level = 1; level <= haar.levels && level <= 2; ++level) {
    const Details& d = haar.details[level - 1];
    all = all && fits(d.data, d.type, d.column, level == 1 ? 4 : 2, d.batch, d.band, d.channel, d.row);
  }
  for (int level = 3; level <= haar.levels; ++level) {
    const Details& d = haar.details[level - 1];
    all = all && fits(d.data, d.type, d.column, 1, d.batch, d.band, d.channel, d.row);
  }
  return all;
}

}  // namespace fastdiff::cuda
