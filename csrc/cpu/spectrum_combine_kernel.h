// One row of a half spectrum at a time; every_target.h includes this file once for each instruction set. No include
// guard, and no includes here.

// The noise of rows: a standard normal for each real number of the packed half spectrum (half_spectrum.py), which is
// complex and interleaved as the spectrum is, but for its edges.
template <class S>
struct Noise {
  std::vector<float> drawn;
  std::vector<S> wide;
  int64_t width, packed, room;

  FASTDIFF_TARGET explicit Noise(int64_t width)
      : width(width), packed((width + 1) / 2 * 2), room(width + 8) {
    drawn.resize(2 * room);
    if (!std::is_same_v<S, float>) wide.resize(2 * room);
  }

  FASTDIFF_TARGET S* row(int which, uint64_t seed, uint32_t stage, int64_t number) {
    float* const to = drawn.data() + which * room;
    const int64_t first = number * packed;
    normals(seed, stage, kSpectralNoise, first, packed, to);
    if constexpr (std::is_same_v<S, float>) {
      return to + first % 4;
    } else {
      S* const copy = wide.data() + which * room;
      for (int64_t i = 0; i < packed; ++i) copy[i] = to[first % 4 + i];
      return copy;
    }
  }

  // The columns of frequency 0 and, for an even width, Nyquist: conjugate in the rows k and -k, real where they are one.
  FASTDIFF_TARGET void set_edges(S* upper, S* lower) const {
    const S nyquist[2] = {upper[1], lower[1]};
    set_edge(upper, lower, 0, upper[0], lower[0]);
    if (width % 2 == 0) set_edge(upper, lower, width, nyquist[0], nyquist[1]);
  }
  FASTDIFF_TARGET static void set_edge(S* upper, S* lower, int64_t at, S mine, S theirs) {
    lower[at] = mine;
    lower[at + 1] = -theirs;
    upper[at] = upper == lower ? mine * static_cast<S>(1.4142135623730950488) : mine;
    upper[at + 1] = upper == lower ? S(0) : theirs;
  }
};

// to = a drift spectrum + c gain noise.
template <class S>
FASTDIFF_TARGET inline void combine_row(
    const S* __restrict__ spectrum, const S* __restrict__ drift, bool complex, const S* __restrict__ noise,
    const S* __restrict__ gain, S a, S c, int64_t columns, S* __restrict__ to) {
  if (complex) {
    for (int64_t j = 0; j < columns; ++j) {
      const S re = drift[2 * j] * spectrum[2 * j] - drift[2 * j + 1] * spectrum[2 * j + 1];
      const S im = drift[2 * j] * spectrum[2 * j + 1] + drift[2 * j + 1] * spectrum[2 * j];
      to[2 * j] = a * re;
      to[2 * j + 1] = a * im;
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      const S by = a * drift[j];
      to[2 * j] = by * spectrum[2 * j];
      to[2 * j + 1] = by * spectrum[2 * j + 1];
    }
  }
  if (!noise) return;
  for (int64_t j = 0; j < columns; ++j) {
    const S by = c * gain[j];
    to[2 * j] = to[2 * j] + by * noise[2 * j];
    to[2 * j + 1] = to[2 * j + 1] + by * noise[2 * j + 1];
  }
}

// Row k of a half spectrum, as its part of the Hartley spectrum's rows k and -k.
template <class S>
FASTDIFF_TARGET inline void place_row(
    const S* __restrict__ value, S* __restrict__ mine, S* __restrict__ mirror, int64_t width) {
  for (int64_t j = 0; j < (width + 1) / 2; ++j) mine[j] = value[2 * j] - value[2 * j + 1];
  for (int64_t j = 1; j <= width / 2; ++j) mirror[width - j] = value[2 * j] + value[2 * j + 1];
}

// The squared norm of a row of the whole spectrum: a column inside stands for its mirror image too.
template <class S>
FASTDIFF_TARGET inline double squared_norm(const S* value, const S* factor, bool complex, int64_t width) {
  const int64_t columns = width / 2 + 1;
  const auto square = [&](int64_t j) {
    const S power = value[2 * j] * value[2 * j] + value[2 * j + 1] * value[2 * j + 1];
    const S by = complex ? factor[2 * j] * factor[2 * j] + factor[2 * j + 1] * factor[2 * j + 1] : factor[j] * factor[j];
    return by * power;
  };
  constexpr int lanes = 16;
  S part[lanes] = {};
  int64_t j = 1;
  for (; j + lanes <= columns - 1; j += lanes)
    for (int lane = 0; lane < lanes; ++lane) part[lane] += square(j + lane);
  for (; j < columns - 1; ++j) part[0] += square(j);
  double all = static_cast<double>(square(0));
  for (const S sum : part) all += 2 * static_cast<double>(sum);
  if (columns > 1) all += (width % 2 ? 2 : 1) * static_cast<double>(square(columns - 1));
  return all;
}

// What one range works in.
template <class S>
struct Room {
  Noise<S> noise;
  std::vector<S> sum;  // of rows of the half spectrum, on their way

  FASTDIFF_TARGET explicit Room(const SpectrumCombine& combine)
      : noise(combine.seeds ? combine.width : 0), sum(2 * combine.columns() * rows_at_once(combine)) {}

  // Short rows go together, they lie side by side.
  FASTDIFF_TARGET static int64_t rows_at_once(const SpectrumCombine& combine) {
    const int64_t rows = kChunk / combine.columns();
    return rows < 1 ? 1 : rows < combine.height ? rows : combine.height;
  }
};

// Where row k of an image begins.
template <class S>
struct Rows {
  const S *spectrum, *drift, *noise, *gain, *row;
  S* hartley;  // of the image

  FASTDIFF_TARGET Rows(const SpectrumCombine& combine, int64_t image, int64_t k) {
    const int64_t columns = combine.columns(), channel = image % combine.channels;
    const int64_t index = image * combine.height + k;
    spectrum = static_cast<const S*>(combine.spectrum) + 2 * columns * index;
    const int64_t numbers = combine.drift_is_complex ? 2 : 1;
    const int64_t drift_row = (combine.drift_per_channel ? channel * combine.height : 0) + k;
    const int64_t gain_row = (combine.gain_per_channel ? channel * combine.height : 0) + k;
    drift = static_cast<const S*>(combine.drift) + numbers * columns * drift_row;
    gain = combine.gain ? static_cast<const S*>(combine.gain) + columns * gain_row : nullptr;
    noise = combine.noise_spectrum ? static_cast<const S*>(combine.noise_spectrum) + 2 * columns * index : nullptr;
    row = static_cast<const S*>(combine.row) + (combine.row_per_sample ? image / combine.channels * 2 : 0);
    hartley = static_cast<S*>(combine.hartley) + combine.width * combine.height * image;
  }
};

template <class S>
FASTDIFF_TARGET inline void place_rows(
    const SpectrumCombine& combine, const S* sum, S* hartley, int64_t k, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t mirror = k + i == 0 ? 0 : combine.height - k - i;
    place_row(sum + 2 * combine.columns() * i, hartley + combine.width * (k + i), hartley + combine.width * mirror,
              combine.width);
  }
}

template <class S>
FASTDIFF_TARGET inline void run_row(
    const SpectrumCombine& combine, int64_t image, int64_t k, const S* drawn, Room<S>& room) {
  const Rows<S> at(combine, image, k);
  const double unit = drawn ? combine.unit() : 1;
  const S* const noise = drawn ? drawn : at.noise;
  if (combine.squares) {
    double* const squares = combine.squares + 2 * (image * combine.height + k);
    const double a = static_cast<double>(at.row[0]);
    squares[0] = squared_norm(at.spectrum, at.drift, combine.drift_is_complex, combine.width) * a * a;
    squares[1] = noise ? squared_norm(noise, at.gain, false, combine.width) * unit * unit : 0;
    const int64_t numbers = 2 * combine.columns();
    if (drawn)
      std::memcpy(static_cast<S*>(combine.drawn) + numbers * (image * combine.height + k), drawn, numbers * sizeof(S));
    return;
  }
  S* const sum = room.sum.data();
  combine_row(at.spectrum, at.drift, combine.drift_is_complex, noise, at.gain, at.row[0],
              static_cast<S>(at.row[1] * unit), combine.columns(), sum);
  place_rows(combine, sum, at.hartley, k, 1);
}

template <class S>
FASTDIFF_TARGET inline void run_pairs(const SpectrumCombine& combine, int64_t begin, int64_t end) {
  Room<S> room(combine);
  const uint32_t stage = combine.stage ? static_cast<uint32_t>(combine.stage[0]) : combine.stage_number;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t pairs = combine.height / 2 + 1, k = index % pairs, mirror = (combine.height - k) % combine.height;
    const int64_t image = index / pairs, channel = image % combine.channels, sample = image / combine.channels;
    const S* const row = static_cast<const S*>(combine.row) + (combine.row_per_sample ? 2 * sample : 0);
    S *upper = nullptr, *lower = nullptr;
    if (combine.seeds && (combine.squares || row[1] != 0)) {
      const uint64_t seed = static_cast<uint64_t>(combine.seeds[sample]);
      upper = lower = room.noise.row(0, seed, stage, channel * combine.height + k);
      if (k != mirror) lower = room.noise.row(1, seed, stage, channel * combine.height + mirror);
      room.noise.set_edges(upper, lower);
    }
    run_row(combine, image, k, upper, room);
    if (k != mirror) run_row(combine, image, mirror, lower, room);
  }
}

// Rows without noise to draw.
template <class S>
FASTDIFF_TARGET inline void run_rows(const SpectrumCombine& combine, int64_t begin, int64_t end) {
  Room<S> room(combine);
  const int64_t at_once = Room<S>::rows_at_once(combine);
  for (int64_t index = begin, count; index < end; index += count) {
    const int64_t image = index / combine.height, k = index % combine.height;
    count = combine.height - k < end - index ? combine.height - k : end - index;
    count = count < at_once ? count : at_once;
    const Rows<S> at(combine, image, k);
    combine_row(at.spectrum, at.drift, combine.drift_is_complex, at.noise, at.gain, at.row[0], at.row[1],
                combine.columns() * count, room.sum.data());
    place_rows(combine, room.sum.data(), at.hartley, k, count);
  }
}

template <class S>
FASTDIFF_TARGET inline void run_as(const SpectrumCombine& combine, int64_t begin, int64_t end) {
  if (combine.in_pairs())
    run_pairs<S>(combine, begin, end);
  else
    run_rows<S>(combine, begin, end);
}

FASTDIFF_TARGET void run(const SpectrumCombine& combine, int64_t begin, int64_t end) {
  if (combine.is_double)
    run_as<double>(combine, begin, end);
  else
    run_as<float>(combine, begin, end);
}
