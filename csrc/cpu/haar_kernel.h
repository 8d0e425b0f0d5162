// The kernels, compiled once per instruction set by every_target.h. No include guard, and no includes here.
//
// A tile begins and ends at multiples of 2^levels, so it never needs a neighbour; what lies beyond an odd edge is zero.

template <class S>
using Row = const S* __restrict;

// Two rows of `count` columns to the rows of their bands; the second row may be zeros.
template <class S>
FASTDIFF_TARGET inline void split_rows(
    Row<S> top, Row<S> bottom, int64_t count, S* __restrict low, S* __restrict v, S* __restrict h, S* __restrict d) {
  const int64_t pairs = count / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const Quad<S> q = split_quad(top[2 * i], top[2 * i + 1], bottom[2 * i], bottom[2 * i + 1]);
    low[i] = q.low;
    v[i] = q.v;
    h[i] = q.h;
    d[i] = q.d;
  }
  if (count % 2) {
    const Quad<S> q = split_quad(top[count - 1], S{0}, bottom[count - 1], S{0});
    low[pairs] = q.low;
    v[pairs] = q.v;
    h[pairs] = q.h;
    d[pairs] = q.d;
  }
}

template <class S>
FASTDIFF_TARGET inline void merge_rows(
    Row<S> low, Row<S> v, Row<S> h, Row<S> d, int64_t count, S* __restrict top, S* __restrict bottom) {
  const int64_t pairs = count / 2;
  for (int64_t i = 0; i < pairs; ++i) {
    const Quad<S> q{low[i], v[i], h[i], d[i]};
    merge_quad(q, top[2 * i], top[2 * i + 1], bottom[2 * i], bottom[2 * i + 1]);
  }
  if (count % 2) {
    S beyond, beneath;
    const Quad<S> q{low[pairs], v[pairs], h[pairs], d[pairs]};
    merge_quad(q, top[count - 1], beyond, bottom[count - 1], beneath);
  }
}

template <class From, class S>
FASTDIFF_TARGET inline void gather(const void* from, int64_t offset, int64_t stride, S* to, int64_t count) {
  const From* source = static_cast<const From*>(from) + offset;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(widen(source[i * stride]));
}

template <class To, class S>
FASTDIFF_TARGET inline void scatter(const S* from, void* to, int64_t offset, int64_t stride, int64_t count) {
  To* target = static_cast<To*>(to) + offset;
  for (int64_t i = 0; i < count; ++i) narrow(from[i], target[i * stride]);
}

// A row in memory as S: in place where it is one already, else in the buffer.
template <class S>
FASTDIFF_TARGET inline const S* load_row(
    const void* from, Type type, int64_t offset, int64_t stride, int64_t count, S* buffer) {
  if (stride == 1) return view(from, type, offset, buffer, count);
  switch (type) {
    case Type::f64: gather<double>(from, offset, stride, buffer, count); break;
    case Type::f32: gather<float>(from, offset, stride, buffer, count); break;
    case Type::f16: gather<Half>(from, offset, stride, buffer, count); break;
    case Type::bf16: gather<BFloat16>(from, offset, stride, buffer, count); break;
  }
  return buffer;
}

template <class S>
FASTDIFF_TARGET inline void store_row(
    const S* from, void* to, Type type, int64_t offset, int64_t stride, int64_t count, bool stream) {
  if (stride == 1) {
    if (type != (sizeof(S) == 8 ? Type::f64 : Type::f32)) return write_as(from, S{1}, to, type, offset, count);
    S* const target = static_cast<S*>(to) + offset;
    if (stream) return copy_streaming(from, target, count * sizeof(S));
    memcpy(target, from, count * sizeof(S));
    return;
  }
  switch (type) {
    case Type::f64: return scatter<double>(from, to, offset, stride, count);
    case Type::f32: return scatter<float>(from, to, offset, stride, count);
    case Type::f16: return scatter<Half>(from, to, offset, stride, count);
    case Type::bf16: return scatter<BFloat16>(from, to, offset, stride, count);
  }
}

// Which part of which plane a tile is; rows and columns at each level.
struct Tile {
  int64_t sample, channel, y[kMaxLevels + 1], x[kMaxLevels + 1], rows[kMaxLevels + 1], columns[kMaxLevels + 1];
};

inline Tile tile_at(const Haar& haar, const TileGrid& grid, int64_t number) {
  const int64_t plane = number / (grid.down * grid.across), place = number - plane * grid.down * grid.across;
  const int64_t below = place / grid.across;
  Tile tile;
  tile.sample = plane / haar.channels;
  tile.channel = plane - tile.sample * haar.channels;
  tile.y[0] = below * grid.rows;
  tile.x[0] = (place - below * grid.across) * grid.columns;
  tile.rows[0] = haar.height - tile.y[0] < grid.rows ? haar.height - tile.y[0] : grid.rows;
  tile.columns[0] = haar.width - tile.x[0] < grid.columns ? haar.width - tile.x[0] : grid.columns;
  for (int j = 1; j <= haar.levels; ++j) {
    tile.y[j] = tile.y[0] >> j;
    tile.x[j] = tile.x[0] >> j;
    tile.rows[j] = side(tile.rows[0], j);
    tile.columns[j] = side(tile.columns[0], j);
  }
  return tile;
}

// The coefficients of a tile: details of each level, and the low bands on the way; low[levels] is the coarse image's.
template <class S>
struct Coefficients {
  alignas(64) S low[2 * kTileElements], detail[kTileElements];

  S* low_row(int level, int64_t row) {  // levels 0, 1, ... take 1, 1/4, ... of a tile
    int64_t start = 0;
    for (int j = 0; j < level; ++j) start += kTileElements >> 2 * j;
    return low + start + row * stride(level);
  }
  S* detail_row(int level, int band, int64_t row) {
    int64_t start = 0;
    for (int j = 1; j < level; ++j) start += 3 * (kTileElements >> 2 * j);
    return detail + start + band * (kTileElements >> 2 * level) + row * stride(level);
  }
  S* row(int level, int band, int64_t i) { return band == 3 ? low_row(level, i) : detail_row(level, band, i); }
  int64_t stride(int level) const { return columns >> level; }
  int64_t columns;  // of a whole tile at level 0
};

template <class S>
struct Scratch {
  Coefficients<S> first, second;
  alignas(64) S top[kTileElements], bottom[kTileElements], zeros[kTileElements];
  alignas(64) float normals[kTileElements + 8];
  alignas(64) S noise[kTileElements];

  explicit Scratch(int64_t columns) : zeros{} { first.columns = second.columns = columns; }
};

template <class S>
FASTDIFF_TARGET const S* image_row(const Image& image, const Tile& tile, int64_t row, S* buffer) {
  const int64_t offset = tile.sample * image.batch + tile.channel * image.channel + (tile.y[0] + row) * image.row +
                         tile.x[0] * image.column;
  return load_row(image.data, image.type, offset, image.column, tile.columns[0], buffer);
}

// Rows in memory of a level's band (3: the coarse image).
struct BandRow {
  void* data;
  Type type;
  int64_t offset, stride;
};

inline BandRow band_row(const Haar& haar, const Tile& tile, int level, int band, int64_t row) {
  if (band == 3) {
    const Image& c = haar.coarse;
    return {c.data, c.type,
            tile.sample * c.batch + tile.channel * c.channel + (tile.y[level] + row) * c.row + tile.x[level] * c.column,
            c.column};
  }
  const Details& d = haar.details[level - 1];
  return {d.data, d.type,
          tile.sample * d.batch + band * d.band + tile.channel * d.channel + (tile.y[level] + row) * d.row +
              tile.x[level] * d.column,
          d.column};
}

template <class S>
FASTDIFF_TARGET void split_tile(
    const Image& image, int levels, const Tile& tile, Coefficients<S>& to, Scratch<S>& scratch) {
  if (levels == 0) {
    for (int64_t i = 0; i < tile.rows[0]; ++i) {
      const S* const row = image_row(image, tile, i, scratch.top);
      memcpy(to.low_row(0, i), row, tile.columns[0] * sizeof(S));
    }
    return;
  }
  for (int j = 1; j <= levels; ++j) {
    for (int64_t i = 0; i < tile.rows[j]; ++i) {
      const bool below = 2 * i + 1 < tile.rows[j - 1];
      const S *top, *bottom = scratch.zeros;
      if (j == 1) {
        top = image_row(image, tile, 2 * i, scratch.top);
        if (below) bottom = image_row(image, tile, 2 * i + 1, scratch.bottom);
      } else {
        top = to.low_row(j - 1, 2 * i);
        if (below) bottom = to.low_row(j - 1, 2 * i + 1);
      }
      split_rows<S>(
          top, bottom, tile.columns[j - 1], to.low_row(j, i), to.detail_row(j, 0, i), to.detail_row(j, 1, i),
          to.detail_row(j, 2, i));
    }
  }
}

// The image row of `result`, where a row may be made in place, else a buffer; give it back with put_row.
template <class S>
struct ResultRow {
  S* data;
  bool in_place;
  int64_t offset;

  FASTDIFF_TARGET ResultRow(const Haar& haar, const Tile& tile, int64_t row, S* buffer) {
    const Image& image = haar.result;
    offset = tile.sample * image.batch + tile.channel * image.channel + (tile.y[0] + row) * image.row +
             tile.x[0] * image.column;
    in_place = !haar.stream && image.column == 1 && image.type == (sizeof(S) == 8 ? Type::f64 : Type::f32);
    data = in_place ? static_cast<S*>(image.data) + offset : buffer;
  }
  FASTDIFF_TARGET void put(const Haar& haar, const Tile& tile) const {
    if (in_place) return;
    const Image& image = haar.result;
    store_row(data, image.data, image.type, offset, image.column, tile.columns[0], haar.stream);
  }
};

// `Source` gives the rows of details and of the coarse image; low bands on the way go to `low`.
template <class S, class Source>
FASTDIFF_TARGET void merge_tile(
    const Haar& haar, const Tile& tile, Source& source, Coefficients<S>& low, Scratch<S>& scratch) {
  if (haar.levels == 0) {
    for (int64_t i = 0; i < tile.rows[0]; ++i) {
      const ResultRow<S> to(haar, tile, i, scratch.top);
      memcpy(to.data, source.row(0, 3, i), tile.columns[0] * sizeof(S));
      to.put(haar, tile);
    }
    return;
  }
  for (int j = haar.levels; j >= 1; --j) {
    for (int64_t i = 0; i < tile.rows[j]; ++i) {
      const S* const coarse = j == haar.levels ? source.row(j, 3, i) : low.low_row(j, i);
      const S *const v = source.row(j, 0, i), *const h = source.row(j, 1, i), *const d = source.row(j, 2, i);
      const bool below = 2 * i + 1 < tile.rows[j - 1];
      if (j > 1) {
        merge_rows<S>(
            coarse, v, h, d, tile.columns[j - 1], low.low_row(j - 1, 2 * i),
            below ? low.low_row(j - 1, 2 * i + 1) : scratch.bottom);
        continue;
      }
      const ResultRow<S> top(haar, tile, 2 * i, scratch.top);
      if (!below) {
        merge_rows<S>(coarse, v, h, d, tile.columns[0], top.data, scratch.bottom);
      } else {
        const ResultRow<S> bottom(haar, tile, 2 * i + 1, scratch.bottom);
        merge_rows<S>(coarse, v, h, d, tile.columns[0], top.data, bottom.data);
        bottom.put(haar, tile);
      }
      top.put(haar, tile);
    }
  }
}

// Rows that are in memory, as S.
template <class S>
struct FromMemory {
  const Haar& haar;
  const Tile& tile;
  Coefficients<S>& buffer;

  FASTDIFF_TARGET const S* row(int level, int band, int64_t i) const {
    const BandRow from = band_row(haar, tile, level, band, i);
    return load_row(
        from.data, from.type, from.offset, from.stride, tile.columns[level], buffer.row(level, band, i));
  }
};

// Rows of a band that lie in the cache without gaps, `count` elements together. table: their row of the coefficients.
struct Block {
  int level, band, table;
  int64_t row, rows, count;
};

// The blocks of a tile from coarse to fine, to call(block): whole bands, or single rows where the tile is not full.
template <class Call>
FASTDIFF_TARGET inline void each_block(const Haar& haar, const TileGrid& grid, const Tile& tile, Call& call) {
  const auto blocks = [&](int level, int band, int table) {
    const int64_t rows = tile.rows[level], columns = tile.columns[level];
    if (columns == grid.columns >> level) return call(Block{level, band, table, 0, rows, rows * columns});
    for (int64_t i = 0; i < rows; ++i) call(Block{level, band, table, i, 1, columns});
  };
  blocks(haar.levels, 3, haar.levels);
  for (int level = haar.levels; level >= 1; --level)
    for (int band = 0; band < 3; ++band) blocks(level, band, level - 1);
}

// The noise of a block.
template <class S>
FASTDIFF_TARGET const S* noise_block(const Haar& haar, const Tile& tile, const Block& block, Scratch<S>& scratch) {
  const int level = block.level;
  const int64_t height = side(haar.height, level), width = side(haar.width, level);
  const int64_t plane = block.band == 3 ? tile.channel : block.band * haar.channels + tile.channel;
  const int64_t plane_offset = pyramid_offset(haar, block.band == 3 ? level + 1 : level) + plane * height * width;
  const bool whole = tile.columns[level] == width;  // then its rows follow one another
  const int64_t runs = whole ? 1 : block.rows, each = block.count / runs;
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = plane_offset + (tile.y[level] + block.row + run) * width + tile.x[level];
    const float* z = normals(haar.seeds[tile.sample], stage_of(haar), haar.purpose, first, each, scratch.normals);
    for (int64_t i = 0; i < each; ++i) scratch.noise[run * each + i] = z[i];
  }
  return scratch.noise;
}

template <class S>
FASTDIFF_TARGET const S* table_row(const Haar& haar, const Tile& tile, int row, int columns) {
  const int64_t sample = haar.row_per_sample ? tile.sample * (haar.levels + 1) : 0;
  return static_cast<const S*>(haar.coefficients) + (sample + row) * columns;
}

// block <- c_x block + c_s score + c_z z
template <class S>
struct Update {
  const Haar& haar;
  const Tile& tile;
  Scratch<S>& scratch;

  FASTDIFF_TARGET void operator()(const Block& block) const {
    const int columns = haar.score.data ? 3 : 2;
    const S* const c = table_row<S>(haar, tile, block.table, columns);
    S* const data = scratch.first.row(block.level, block.band, block.row);
    Sum<S> sum;
    sum.add(c[0], data);
    if (haar.score.data) sum.add(c[1], scratch.second.row(block.level, block.band, block.row));
    if (haar.seeds && c[columns - 1] != 0) sum.add(c[columns - 1], noise_block(haar, tile, block, scratch));
    evaluate(sum, data, block.count);
  }
};

// block <- 2 w f (f block + z) upstream;  total += w (f block + z)^2
template <class S>
struct Loss {
  const Haar& haar;
  const Tile& tile;
  Scratch<S>& scratch;
  double total;

  FASTDIFF_TARGET void operator()(const Block& block) {
    const S* const c = table_row<S>(haar, tile, block.table, 2);
    S* const data = scratch.first.row(block.level, block.band, block.row);
    if (c[0] == 0) {
      memset(data, 0, block.count * sizeof(S));
      return;
    }
    const S* const z = noise_block(haar, tile, block, scratch);
    double squares[8] = {};  // side by side, so that the loop vectorises
    for (int64_t k = 0; k < block.count; k += 8) {
      const int64_t lanes = block.count - k < 8 ? block.count - k : 8;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const S error = c[1] * data[k + lane] + z[k + lane];
        data[k + lane] = error;
        squares[lane] += static_cast<double>(error) * error;
      }
    }
    for (const double square : squares) total += c[0] * square;
    if (!haar.result.data) return;
    const S factor = 2 * c[0] * c[1] * static_cast<const S*>(haar.upstream)[tile.sample];
    for (int64_t k = 0; k < block.count; ++k) data[k] = factor * data[k];
  }
};

template <class S>
struct Work {
  const Haar& haar;
  const TileGrid grid;
  Scratch<S> scratch;

  explicit Work(const Haar& haar) : haar(haar), grid(haar), scratch(grid.columns) {}

  struct Store {
    const Haar& haar;
    const Tile& tile;
    Coefficients<S>& made;

    FASTDIFF_TARGET void operator()(const Block& block) const {
      const int64_t each = block.count / block.rows;
      for (int64_t i = 0; i < block.rows; ++i) {
        const BandRow to = band_row(haar, tile, block.level, block.band, block.row + i);
        const S* const from = made.row(block.level, block.band, block.row + i);
        store_row(from, to.data, to.type, to.offset, to.stride, each, haar.stream);
      }
    }
  };
  FASTDIFF_TARGET void split(const Tile& tile) {
    split_tile(haar.image, haar.levels, tile, scratch.first, scratch);
    Store store{haar, tile, scratch.first};
    each_block(haar, grid, tile, store);
  }
  FASTDIFF_TARGET void merge(const Tile& tile) {
    FromMemory<S> source{haar, tile, scratch.first};
    merge_tile(haar, tile, source, scratch.second, scratch);
  }
  FASTDIFF_TARGET void update_and_merge(const Tile& tile) {
    Update<S> update{haar, tile, scratch};
    each_block(haar, grid, tile, update);
    merge_tile(haar, tile, scratch.first, scratch.first, scratch);
  }
  FASTDIFF_TARGET void step(const Tile& tile) {
    split_tile(haar.image, haar.levels, tile, scratch.first, scratch);
    if (haar.score.data) split_tile(haar.score, haar.levels, tile, scratch.second, scratch);
    update_and_merge(tile);
  }
  FASTDIFF_TARGET void expand(const Tile& tile) {
    for (int64_t i = 0; i < tile.rows[1]; ++i) {
      const BandRow from = band_row(haar, tile, 1, 3, i);
      S* const row = scratch.first.low_row(1, i);
      const S* const coarse = load_row(from.data, from.type, from.offset, from.stride, tile.columns[1], row);
      if (coarse != row) memcpy(row, coarse, tile.columns[1] * sizeof(S));
    }
    memset(scratch.first.detail, 0, sizeof scratch.first.detail);
    update_and_merge(tile);
  }
  FASTDIFF_TARGET double loss(const Tile& tile) {
    split_tile(haar.image, haar.levels, tile, scratch.first, scratch);
    Loss<S> loss{haar, tile, scratch, 0};
    each_block(haar, grid, tile, loss);
    if (haar.result.data) merge_tile(haar, tile, scratch.first, scratch.first, scratch);
    return loss.total;
  }
};

template <class S>
FASTDIFF_TARGET void work_range(const Haar& haar, HaarOp op, int64_t begin, int64_t end, double* losses) {
  Work<S> work(haar);
  for (int64_t number = begin; number < end; ++number) {
    const Tile tile = tile_at(haar, work.grid, number);
    switch (op) {
      case HaarOp::split: work.split(tile); break;
      case HaarOp::merge: work.merge(tile); break;
      case HaarOp::step: work.step(tile); break;
      case HaarOp::expand: work.expand(tile); break;
      case HaarOp::loss: {
        const double loss = work.loss(tile);
        if (losses) losses[number] = loss;
        break;
      }
    }
  }
  if (haar.stream) finish_streaming();
}

FASTDIFF_TARGET void run(const Haar& haar, HaarOp op, int64_t begin, int64_t end, double* losses) {
  haar.is_double ? work_range<double>(haar, op, begin, end, losses) : work_range<float>(haar, op, begin, end, losses);
}
