// One row of a half spectrum at a time; every_target.h includes this file once for each instruction set. No include
// guard, and no includes here.

// The noise of rows: a standard normal for each real number of the packed half spectrum (spectral_update.py), which is
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

template <class S>
FASTDIFF_TARGET inline void combine_row(
    S* spectrum, const S* drift, bool complex, const S* noise, const S* gain, S a, S c, int64_t columns) {
  if (complex) {
    for (int64_t j = 0; j < columns; ++j) {
      const S re = drift[2 * j] * spectrum[2 * j] - drift[2 * j + 1] * spectrum[2 * j + 1];
      const S im = drift[2 * j] * spectrum[2 * j + 1] + drift[2 * j + 1] * spectrum[2 * j];
      spectrum[2 * j] = a * re;
      spectrum[2 * j + 1] = a * im;
    }
  } else {
    for (int64_t j = 0; j < columns; ++j) {
      const S by = a * drift[j];
      spectrum[2 * j] = by * spectrum[2 * j];
      spectrum[2 * j + 1] = by * spectrum[2 * j + 1];
    }
  }
  if (!noise) return;
  for (int64_t j = 0; j < columns; ++j) {
    const S by = c * gain[j];
    spectrum[2 * j] = spectrum[2 * j] + by * noise[2 * j];
    spectrum[2 * j + 1] = spectrum[2 * j + 1] + by * noise[2 * j + 1];
  }
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

template <class S>
FASTDIFF_TARGET inline void run_row(
    const SpectralUpdate& update, int64_t sample, int64_t channel, int64_t k, const S* drawn) {
  const int64_t columns = update.columns(), index = (sample * update.channels + channel) * update.height + k;
  S* const spectrum = static_cast<S*>(update.spectrum) + 2 * columns * index;
  const int64_t table = (update.drift_per_channel ? channel * update.height : 0) + k;
  const S* const drift = static_cast<const S*>(update.drift) + (update.drift_is_complex ? 2 : 1) * columns * table;
  const S* gain = static_cast<const S*>(update.gain);
  if (gain) gain += columns * ((update.gain_per_channel ? channel * update.height : 0) + k);
  const S* const row = static_cast<const S*>(update.row) + (update.row_per_sample ? 2 * sample : 0);
  const S* noise = nullptr;
  double scale = 1;
  if (update.noise_spectrum) {
    noise = static_cast<const S*>(update.noise_spectrum) + 2 * columns * index;
  } else if (drawn) {
    noise = drawn;
    scale = std::sqrt(static_cast<double>(update.height) * static_cast<double>(update.width) / 2);
  }
  if (update.norms) {
    double* const norms = update.norms + 2 * index;
    norms[0] = squared_norm(spectrum, drift, update.drift_is_complex, update.width) * double(row[0]) * double(row[0]);
    norms[1] = noise ? squared_norm(noise, gain, false, update.width) * scale * scale : 0;
  } else {
    combine_row(spectrum, drift, update.drift_is_complex, noise, gain, row[0], static_cast<S>(row[1] * scale), columns);
  }
}

template <class S>
FASTDIFF_TARGET inline void run_pairs(const SpectralUpdate& update, int64_t begin, int64_t end) {
  Noise<S> noise(update.seeds ? update.width : 0);
  const uint32_t stage = update.stage ? static_cast<uint32_t>(update.stage[0]) : update.stage_number;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t pairs = update.height / 2 + 1, k = index % pairs, mirror = (update.height - k) % update.height;
    const int64_t channel = index / pairs % update.channels, sample = index / (pairs * update.channels);
    if (k > mirror) continue;  // an odd height has one pair less
    const S* const row = static_cast<const S*>(update.row) + (update.row_per_sample ? 2 * sample : 0);
    S *upper = nullptr, *lower = nullptr;
    if (update.seeds && (update.norms || row[1] != 0)) {
      const uint64_t seed = static_cast<uint64_t>(update.seeds[sample]);
      upper = lower = noise.row(0, seed, stage, channel * update.height + k);
      if (k != mirror) lower = noise.row(1, seed, stage, channel * update.height + mirror);
      noise.set_edges(upper, lower);
    }
    run_row(update, sample, channel, k, upper);
    if (k != mirror) run_row(update, sample, channel, mirror, lower);
  }
}

// Rows without noise to draw: as many at a time as one image has, they lie side by side.
template <class S>
FASTDIFF_TARGET inline void run_rows(const SpectralUpdate& update, int64_t begin, int64_t end) {
  const int64_t columns = update.columns(), numbers = update.drift_is_complex ? 2 : 1;
  for (int64_t index = begin, next; index < end; index = next) {
    const int64_t image = index / update.height, k = index % update.height, channel = image % update.channels;
    next = (image + 1) * update.height < end ? (image + 1) * update.height : end;
    const S* const row = static_cast<const S*>(update.row) + (update.row_per_sample ? image / update.channels * 2 : 0);
    const int64_t drift_at = columns * ((update.drift_per_channel ? channel * update.height : 0) + k);
    const int64_t gain_at = columns * ((update.gain_per_channel ? channel * update.height : 0) + k);
    const S* const noise = static_cast<const S*>(update.noise_spectrum);
    combine_row(
        static_cast<S*>(update.spectrum) + 2 * columns * index,
        static_cast<const S*>(update.drift) + numbers * drift_at, update.drift_is_complex,
        noise ? noise + 2 * columns * index : nullptr, noise ? static_cast<const S*>(update.gain) + gain_at : nullptr,
        row[0], row[1], columns * (next - index));
  }
}

template <class S>
FASTDIFF_TARGET inline void run_as(const SpectralUpdate& update, int64_t begin, int64_t end) {
  if (update.in_pairs())
    run_pairs<S>(update, begin, end);
  else
    run_rows<S>(update, begin, end);
}

FASTDIFF_TARGET void run(const SpectralUpdate& update, int64_t begin, int64_t end) {
  if (update.is_double)
    run_as<double>(update, begin, end);
  else
    run_as<float>(update, begin, end);
}
