// The spectral updates for CPU tensors.
#include <algorithm>
#include <optional>
#include <vector>

#include "spectral.h"
#include "tensors.h"

namespace {

using fastdiff::ScalarType;
using fastdiff::Tensor;
using fastdiff::type_of;

bool dense(const Tensor& tensor, bool is_double) {
  return tensor.is_contiguous() && type_of(tensor) == (is_double ? fastdiff::Type::f64 : fastdiff::Type::f32);
}

// Whether a table is [1 or channels, height, columns] with so many numbers an entry; says if it is one for each channel.
bool table_per_channel(const Tensor& table, const fastdiff::SpectralUpdate& update, int64_t numbers) {
  const int64_t one = update.height * update.columns() * numbers;
  STD_TORCH_CHECK(
      dense(table, update.is_double) && (table.numel() == one || table.numel() == one * update.channels),
      "spectrum_combine: a table must be [1 or C, H, W // 2 + 1]");
  return table.numel() != one;
}

void spectrum_combine(
    Tensor spectrum,
    int64_t width,
    Tensor drift,
    std::optional<Tensor> gain,
    Tensor row,
    std::optional<Tensor> noise_spectrum,
    std::optional<Tensor> seeds,
    std::optional<Tensor> stage,
    int64_t stage_number,
    std::optional<Tensor> norms) {
  STD_TORCH_CHECK(spectrum.dim() == 5 && spectrum.size(4) == 2, "spectrum_combine: spectrum must be [B, C, H, W // 2 + 1, 2]");
  fastdiff::SpectralUpdate update{};
  update.batch = spectrum.size(0);
  update.channels = spectrum.size(1);
  update.height = spectrum.size(2);
  update.width = width;
  if (spectrum.numel() == 0) return;
  update.is_double = type_of(spectrum) == fastdiff::Type::f64;
  STD_TORCH_CHECK(
      spectrum.size(3) == update.columns() && dense(spectrum, update.is_double),
      "spectrum_combine: spectrum must be contiguous, float32 or float64, of that width");
  update.spectrum = spectrum.data_ptr();
  update.drift_is_complex = drift.dim() == 4;
  update.drift_per_channel = table_per_channel(drift, update, update.drift_is_complex ? 2 : 1);
  update.drift = drift.data_ptr();
  STD_TORCH_CHECK(gain || (!noise_spectrum && !seeds), "spectrum_combine: noise needs a gain");
  if (gain) {
    update.gain_per_channel = table_per_channel(*gain, update, 1);
    update.gain = gain->data_ptr();
  }
  STD_TORCH_CHECK(
      dense(row, update.is_double) && (row.numel() == 2 || row.numel() == 2 * update.batch),
      "spectrum_combine: row must be [1 or B, 2]");
  update.row = row.data_ptr();
  update.row_per_sample = row.numel() != 2;
  if (noise_spectrum) {
    STD_TORCH_CHECK(
        noise_spectrum->numel() == spectrum.numel() && dense(*noise_spectrum, update.is_double),
        "spectrum_combine: noise_spectrum must be like spectrum");
    update.noise_spectrum = noise_spectrum->data_ptr();
  }
  if (seeds) {
    STD_TORCH_CHECK(
        seeds->numel() == update.batch && seeds->is_contiguous() && seeds->scalar_type() == ScalarType::Long,
        "spectrum_combine: a seed for each sample");
    update.seeds = static_cast<const int64_t*>(seeds->data_ptr());
  }
  STD_TORCH_CHECK(
      !stage || (stage->numel() == 1 && stage->scalar_type() == ScalarType::Int), "spectrum_combine: stage is one int32 number");
  update.stage = stage ? static_cast<const int32_t*>(stage->data_ptr()) : nullptr;
  update.stage_number = static_cast<uint32_t>(stage_number);
  std::vector<double> parts;
  if (norms) {
    STD_TORCH_CHECK(
        norms->numel() == 2 * update.batch && dense(*norms, true), "spectrum_combine: norms must be float64 [B, 2]");
    parts.resize(2 * update.rows());
    update.norms = parts.data();
  }
  const int64_t wanted = update.seeds ? fastdiff::kRandomElementsPerThread : fastdiff::kElementsPerThread;
  torch::stable::parallel_for(
      0, update.units(), std::max<int64_t>(1, wanted / (update.in_pairs() ? 2 * width : width)),
      [&](int64_t begin, int64_t end) { fastdiff::cpu::spectral_update(update, begin, end); });
  if (norms) {  // rows in order: the same sum for any number of threads
    double* const sums = static_cast<double*>(norms->data_ptr());
    const int64_t each = update.channels * update.height;
    for (int64_t i = 0; i < 2 * update.batch; ++i) sums[i] = 0;
    for (int64_t r = 0; r < update.rows(); ++r)
      for (int part = 0; part < 2; ++part) sums[r / each * 2 + part] += parts[2 * r + part];
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) { library.impl("spectrum_combine", TORCH_BOX(&spectrum_combine)); }
