// Products and moves in Fourier space for CPU tensors: torch's transforms and the passes between and after them.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "half_spectrum.h"
#include "tensors.h"

namespace {

using fastdiff::ScalarType;
using fastdiff::Tensor;
using fastdiff::type_of;

enum Step : int64_t { kGiven, kSample, kBatch };  // where a move's length comes from

bool dense(const Tensor& tensor, bool is_double) {
  return tensor.is_contiguous() && type_of(tensor) == (is_double ? fastdiff::Type::f64 : fastdiff::Type::f32);
}

bool dense_complex(const Tensor& tensor, bool is_double) {
  return tensor.is_contiguous() &&
      tensor.scalar_type() == (is_double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat);
}

// rfft2 of images in the arithmetic's type: [B, C, H, W // 2 + 1], contiguous, which torch's need not be.
Tensor half_spectrum(const Tensor& images) {
  const int64_t axes[] = {2, 3};
  AtenTensorHandle found = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__fft_r2c(images.get(), axes, 2, /*normalization=*/0, /*onesided=*/1, &found));
  const Tensor spectrum(found);
  return spectrum.is_contiguous() ? spectrum : torch::stable::contiguous(spectrum);
}

// Checks that a table is [1 or channels, height, columns]; says if it is one for each channel.
bool table_per_channel(const Tensor& table, const fastdiff::SpectrumCombine& combine, bool complex) {
  const int64_t one = combine.height * combine.columns();
  STD_TORCH_CHECK(
      (complex ? dense_complex(table, combine.is_double) : dense(table, combine.is_double)) &&
          (table.numel() == one || table.numel() == one * combine.channels),
      "fastdiff: a table of a half spectrum must be [1 or C, H, W // 2 + 1], contiguous, in the arithmetic's dtype");
  return table.numel() != one;
}

void run_pass(const fastdiff::SpectrumCombine& combine) {
  const int64_t wanted = combine.seeds ? fastdiff::kRandomElementsPerThread : fastdiff::kElementsPerThread;
  torch::stable::parallel_for(
      0, combine.units(), std::max<int64_t>(1, wanted / (combine.in_pairs() ? 2 * combine.width : combine.width)),
      [&](int64_t begin, int64_t end) { fastdiff::cpu::spectrum_combine(combine, begin, end); });
}

// The rows (a h, sqrt(2 h) unit) of adaptive steps of (a, k), h = k (|noise| / |direction|)^2: of each sample, or of the
// means over the batch. squares: [batch, channels, height, 2], those of direction and noise.
template <class S>
std::vector<S> adaptive_rows(
    const fastdiff::SpectrumCombine& combine, const std::vector<double>& squares, bool per_batch, double unit) {
  const S* const row = static_cast<const S*>(combine.row);
  const int64_t each = combine.channels * combine.height;
  std::vector<double> direction(combine.batch), noise(combine.batch);  // norms
  double all_direction = 0, all_noise = 0;
  for (int64_t b = 0; b < combine.batch; ++b) {
    for (int64_t r = b * each; r < (b + 1) * each; ++r) {  // in order: the same sum for any number of threads
      direction[b] += squares[2 * r];
      noise[b] += squares[2 * r + 1];
    }
    all_direction += direction[b] = std::sqrt(direction[b]);
    all_noise += noise[b] = std::sqrt(noise[b]);
  }
  std::vector<S> rows(2 * combine.batch);
  for (int64_t b = 0; b < combine.batch; ++b) {
    const S* const given = row + (combine.row_per_sample ? 2 * b : 0);
    const double ratio = per_batch ? all_noise / all_direction : noise[b] / direction[b];
    const double h = static_cast<double>(given[1]) * ratio * ratio;
    rows[2 * b] = static_cast<S>(static_cast<double>(given[0]) * h);
    rows[2 * b + 1] = static_cast<S>(std::sqrt(2 * h) * unit);
  }
  return rows;
}

// Two passes: one for the norms, which keeps the noise that it draws, and one that moves.
template <class S>
void take_adaptive_step(fastdiff::SpectrumCombine& combine, bool per_batch) {
  std::vector<double> squares(2 * combine.rows());
  const std::unique_ptr<S[]> drawn(combine.seeds ? new S[2 * combine.rows() * combine.columns()] : nullptr);
  combine.squares = squares.data();
  combine.drawn = drawn.get();
  run_pass(combine);
  const std::vector<S> rows = adaptive_rows<S>(combine, squares, per_batch, drawn ? combine.unit() : 1);
  combine.squares = nullptr;
  if (drawn) combine.noise_spectrum = drawn.get();
  combine.seeds = nullptr;
  combine.row = rows.data();
  combine.row_per_sample = true;
  run_pass(combine);
}

// What a pass needs at least: hartley <- that of drift spectrum, by a row that is still to come.
fastdiff::SpectrumCombine combine_of(const Tensor& spectrum, const Tensor& hartley, const Tensor& drift) {
  fastdiff::SpectrumCombine combine{};
  combine.batch = hartley.size(0);
  combine.channels = hartley.size(1);
  combine.height = hartley.size(2);
  combine.width = hartley.size(3);
  combine.is_double = type_of(hartley) == fastdiff::Type::f64;
  combine.hartley = hartley.data_ptr();
  combine.spectrum = spectrum.data_ptr();
  combine.drift_is_complex = dense_complex(drift, combine.is_double);
  combine.drift_per_channel = table_per_channel(drift, combine, combine.drift_is_complex);
  combine.drift = drift.data_ptr();
  return combine;
}

// hartley <- that of row_0 drift spectrum + row_1 gain noise.
void combine_spectra(
    const Tensor& spectrum,
    const Tensor& hartley,
    const Tensor& drift,
    const std::optional<Tensor>& gain,
    const Tensor& row,
    const std::optional<Tensor>& noise_spectrum,
    const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& stage,
    int64_t stage_number,
    int64_t step) {
  fastdiff::SpectrumCombine combine = combine_of(spectrum, hartley, drift);
  STD_TORCH_CHECK(gain || (!noise_spectrum && !seeds), "spectral_move: noise needs a gain");
  if (gain) {
    combine.gain_per_channel = table_per_channel(*gain, combine, false);
    combine.gain = gain->data_ptr();
  }
  STD_TORCH_CHECK(
      dense(row, combine.is_double) && (row.numel() == 2 || row.numel() == 2 * combine.batch),
      "spectral_move: row must be [1 or B, 2]");
  combine.row = row.data_ptr();
  combine.row_per_sample = row.numel() != 2;
  if (noise_spectrum) combine.noise_spectrum = noise_spectrum->data_ptr();
  if (seeds) {
    STD_TORCH_CHECK(
        seeds->numel() == combine.batch && seeds->is_contiguous() && seeds->scalar_type() == ScalarType::Long,
        "spectral_move: a seed for each sample");
    combine.seeds = static_cast<const int64_t*>(seeds->data_ptr());
  }
  STD_TORCH_CHECK(
      !stage || (stage->numel() == 1 && stage->scalar_type() == ScalarType::Int), "spectral_move: stage is one int32 number");
  combine.stage = stage ? static_cast<const int32_t*>(stage->data_ptr()) : nullptr;
  combine.stage_number = static_cast<uint32_t>(stage_number);
  if (step == kGiven) return run_pass(combine);
  STD_TORCH_CHECK(noise_spectrum || seeds, "spectral_move: an adaptive step needs noise");
  if (combine.is_double)
    take_adaptive_step<double>(combine, step == kBatch);
  else
    take_adaptive_step<float>(combine, step == kBatch);
}

// y <- x + the Hartley spectrum of `spectrum`.
void add_hartley(const Tensor& spectrum, const std::optional<Tensor>& x, const Tensor& y) {
  fastdiff::HartleyAdd add{};
  add.channels = y.size(1);
  add.images = y.size(0) * add.channels;
  add.height = y.size(2);
  add.width = y.size(3);
  add.type = type_of(y);
  add.is_double = add.type == fastdiff::Type::f64;
  add.spectrum = spectrum.data_ptr();
  add.y = y.data_ptr();
  for (int d = 0; d < 4; ++d) add.y_strides[d] = y.stride(d);
  if (x) {
    add.x = x->data_ptr();
    for (int d = 0; d < 4; ++d) add.x_strides[d] = x->stride(d);
  }
  torch::stable::parallel_for(
      0, add.rows(), std::max<int64_t>(1, fastdiff::kElementsPerThread / add.width),
      [&](int64_t begin, int64_t end) { fastdiff::cpu::hartley_add(add, begin, end); });
}

void check_like(const Tensor& tensor, const Tensor& y, ScalarType type) {
  STD_TORCH_CHECK(
      tensor.dim() == 4 && tensor.scalar_type() == type, "spectral_move: images must be [B, C, H, W], of dtypes that agree");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(tensor.size(d) == y.size(d), "spectral_move: images must agree in size");
}

// Where the Hartley spectrum of a result goes: y itself, where it can hold it and is not x, which is read after it.
Tensor room_in(const Tensor& y, const std::optional<Tensor>& x, ScalarType wide) {
  if (dense(y, wide == ScalarType::Double) && !(x && x->data_ptr() == y.data_ptr())) return y;
  return torch::stable::new_empty(y, std::vector<int64_t>{y.size(0), y.size(1), y.size(2), y.size(3)}, wide);
}

Tensor spectral_product(Tensor x, Tensor table) {
  const bool is_double = type_of(x) == fastdiff::Type::f64;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  check_like(x, x, x.scalar_type());
  const Tensor y = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), x.size(1), x.size(2), x.size(3)});
  if (y.numel() == 0) return y;
  const Tensor hartley = room_in(y, std::nullopt, wide);
  const Tensor spectrum = half_spectrum(x.scalar_type() == wide ? x : torch::stable::to(x, wide));
  fastdiff::SpectrumCombine combine = combine_of(spectrum, hartley, table);
  const double one_double[] = {1, 0};
  const float one_float[] = {1, 0};
  combine.row = is_double ? static_cast<const void*>(one_double) : one_float;
  run_pass(combine);
  add_hartley(half_spectrum(hartley), std::nullopt, y);
  return y;
}

// y may be x, or shares no memory with it.
void spectral_move(
    Tensor direction,
    std::optional<Tensor> x,
    Tensor y,
    Tensor drift,
    std::optional<Tensor> gain,
    Tensor row,
    std::optional<Tensor> noise,
    std::optional<Tensor> seeds,
    std::optional<Tensor> stage,
    int64_t stage_number,
    int64_t step) {
  const bool is_double = type_of(y) == fastdiff::Type::f64;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  check_like(y, y, y.scalar_type());
  check_like(direction, y, wide);
  if (x) check_like(*x, y, y.scalar_type());
  if (noise) check_like(*noise, y, wide);
  if (y.numel() == 0) return;
  std::optional<Tensor> noise_spectrum;
  if (noise) noise_spectrum = half_spectrum(*noise);
  const Tensor hartley = room_in(y, x, wide);
  combine_spectra(half_spectrum(direction), hartley, drift, gain, row, noise_spectrum, seeds, stage, stage_number, step);
  add_hartley(half_spectrum(hartley), x, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) {
  library.impl("spectral_product", TORCH_BOX(&spectral_product));
  library.impl("spectral_move", TORCH_BOX(&spectral_move));
}
