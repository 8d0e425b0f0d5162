// The Haar operators. Tensors come in any strides; what is made is dense, contiguous or channels_last.
#include "haar.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"

#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"
#endif

namespace {

using fastdiff::Haar;
using fastdiff::HaarOp;
using fastdiff::side;
using fastdiff::Tensor;
using fastdiff::type_of;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

fastdiff::Image image_of(const Tensor& t) {
  return {t.data_ptr(), type_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

fastdiff::Details details_of(const Tensor& t) {
  return {t.data_ptr(), type_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

Haar sized(int64_t levels, int64_t batch, int64_t channels, int64_t height, int64_t width, const Tensor& like) {
  STD_TORCH_CHECK(levels >= 0 && levels <= fastdiff::kMaxLevels, "haar: levels must be 0 to 5");
  Haar haar{};
  haar.levels = static_cast<int>(levels);
  haar.batch = batch;
  haar.channels = channels;
  haar.height = height;
  haar.width = width;
  haar.is_double = type_of(like) == fastdiff::Type::f64;
  return haar;
}

Haar sized(int64_t levels, const Tensor& image) {
  STD_TORCH_CHECK(image.dim() == 4, "haar: an image has four dimensions");
  return sized(levels, image.size(0), image.size(1), image.size(2), image.size(3), image);
}

Tensor result_of(Haar& haar, const Tensor& like, bool channels_last) {
  Tensor result = torch::stable::empty(
      {haar.batch, haar.channels, haar.height, haar.width}, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  haar.result = image_of(result);
  return result;
}

void add_numbers(
    Haar& haar, const Tensor& coefficients, int64_t columns, const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& stage, int64_t stage_number, uint32_t purpose = fastdiff::kPyramidNoise) {
  const int64_t table = (haar.levels + 1) * columns, count = coefficients.numel();
  STD_TORCH_CHECK(
      (count == table || count == haar.batch * table) && coefficients.is_contiguous() &&
          (type_of(coefficients) == fastdiff::Type::f64) == haar.is_double,
      "haar: a row of coefficients for each level and the coarse image");
  STD_TORCH_CHECK(
      !seeds || (seeds->numel() == haar.batch && seeds->is_contiguous() && seeds->scalar_type() == ScalarType::Long),
      "haar: a seed for each sample");
  STD_TORCH_CHECK(
      !stage || (stage->numel() == 1 && stage->scalar_type() == ScalarType::Int), "haar: stage is one int32 number");
  haar.coefficients = coefficients.data_ptr();
  haar.row_per_sample = count != table;
  haar.seeds = seeds ? static_cast<const int64_t*>(seeds->data_ptr()) : nullptr;
  haar.stage = stage ? static_cast<const int32_t*>(stage->data_ptr()) : nullptr;
  haar.stage_number = static_cast<uint32_t>(stage_number);
  haar.purpose = purpose;
}

void add_coarse(Haar& haar, const Tensor& coarse) {
  STD_TORCH_CHECK(
      coarse.dim() == 4 && coarse.size(0) == haar.batch && coarse.size(1) == haar.channels &&
          coarse.size(2) == side(haar.height, haar.levels) && coarse.size(3) == side(haar.width, haar.levels),
      "haar: the coarse image does not fit the size");
  haar.coarse = image_of(coarse);
}

struct Cpu {
  static void run(Haar& haar, HaarOp op, const Tensor&, double* losses = nullptr) {
    if (haar.batch * haar.channels * haar.height * haar.width == 0) return;
    const int64_t moved = fastdiff::pyramid_elements(haar) * fastdiff::size_of(haar.is_double ? fastdiff::Type::f64 : fastdiff::Type::f32);
    haar.stream = 2 * moved > fastdiff::kStreamBytes;
    const int64_t wanted = haar.seeds ? fastdiff::kRandomElementsPerThread : fastdiff::kElementsPerThread;
    const int64_t grain = std::max<int64_t>(1, wanted / fastdiff::cpu::haar_tile_elements(haar));
    torch::stable::parallel_for(0, fastdiff::cpu::haar_tiles(haar), grain, [&](int64_t begin, int64_t end) {
      fastdiff::cpu::haar(haar, op, begin, end, losses);
    });
  }
  // Sums of the tiles' losses, in order.
  static void reduce(Haar& haar, const Tensor& image, const Tensor& sums) {
    const int64_t tiles = haar.height > 0 && haar.width > 0 ? fastdiff::cpu::haar_tiles(haar) : 0;
    std::vector<double> losses(tiles);
    run(haar, HaarOp::loss, image, losses.data());
    for (int64_t sample = 0; sample < haar.batch; ++sample) {
      const int64_t each = tiles / haar.batch;
      double sum = 0;
      for (int64_t i = 0; i < each; ++i) sum += losses[sample * each + i];
      if (haar.is_double)
        static_cast<double*>(sums.data_ptr())[sample] = sum;
      else
        static_cast<float*>(sums.data_ptr())[sample] = static_cast<float>(sum);
    }
  }
};

#ifdef USE_CUDA
struct Cuda {
  static void check(const char* error) { STD_TORCH_CHECK(!error, "fastdiff: ", error); }
  static void* stream_on(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    return stream;
  }
  static void run(Haar& haar, HaarOp op, const Tensor& on, double* losses = nullptr) {
    if (haar.batch * haar.channels * haar.height * haar.width == 0) return;
    STD_TORCH_CHECK(
        fastdiff::cuda::haar_blocks(haar) < (int64_t{1} << 31), "haar: more than 2^31 blocks of 8192 elements");
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    check(fastdiff::cuda::haar(haar, op, losses, stream_on(on)));
  }
  static void reduce(Haar& haar, const Tensor& image, const Tensor& sums) {
    if (haar.batch * haar.channels * haar.height * haar.width == 0) {
      torch::stable::fill_(sums, 0);
      return;
    }
    Tensor losses = torch::stable::new_empty(sums, {fastdiff::cuda::haar_losses(haar)}, ScalarType::Double);
    double* const partial = static_cast<double*>(losses.data_ptr());
    run(haar, HaarOp::loss, image, partial);
    const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
    check(fastdiff::cuda::haar_sum(haar, partial, sums.data_ptr(), stream_on(image)));
  }
};
#endif

template <class Device>
Tensor haar_split(Tensor x, int64_t levels, bool channels_last) {
  Haar haar = sized(levels, x);
  haar.image = image_of(x);
  Tensor flat = torch::stable::new_empty(x, {fastdiff::pyramid_elements(haar)});
  lay_out(haar, flat.data_ptr(), type_of(flat), channels_last);
  Device::run(haar, HaarOp::split, x);
  return flat;
}

template <class Device>
Tensor haar_merge(std::vector<Tensor> details, Tensor coarse, int64_t height, int64_t width, bool channels_last) {
  STD_TORCH_CHECK(coarse.dim() == 4, "haar: an image has four dimensions");
  Haar haar = sized(details.size(), coarse.size(0), coarse.size(1), height, width, coarse);
  for (int level = 1; level <= haar.levels; ++level) {
    const Tensor& d = details[level - 1];
    STD_TORCH_CHECK(
        d.dim() == 5 && d.size(0) == haar.batch && d.size(1) == 3 && d.size(2) == haar.channels &&
            d.size(3) == side(height, level) && d.size(4) == side(width, level) && type_of(d) == type_of(coarse),
        "haar: the details of level ", level, " do not fit the size");
    haar.details[level - 1] = details_of(d);
  }
  add_coarse(haar, coarse);
  Tensor result = result_of(haar, coarse, channels_last);
  Device::run(haar, HaarOp::merge, coarse);
  return result;
}

template <class Device>
Tensor haar_step(
    Tensor x, std::optional<Tensor> score, Tensor coefficients, std::optional<Tensor> seeds,
    std::optional<Tensor> stage, int64_t stage_number, int64_t levels, bool channels_last) {
  Haar haar = sized(levels, x);
  haar.image = image_of(x);
  if (score) {
    STD_TORCH_CHECK(
        score->dim() == 4 && score->size(0) == x.size(0) && score->size(1) == x.size(1) && score->size(2) == x.size(2) &&
            score->size(3) == x.size(3),
        "haar_step: score must have the shape of x");
    haar.score = image_of(*score);
  }
  add_numbers(haar, coefficients, score ? 3 : 2, seeds, stage, stage_number);
  Tensor result = result_of(haar, x, channels_last);
  Device::run(haar, HaarOp::step, x);
  return result;
}

template <class Device>
Tensor haar_expand(
    Tensor coarse, Tensor coefficients, Tensor seeds, std::optional<Tensor> stage, int64_t stage_number,
    int64_t height, int64_t width, bool channels_last) {
  STD_TORCH_CHECK(coarse.dim() == 4, "haar: an image has four dimensions");
  Haar haar = sized(1, coarse.size(0), coarse.size(1), height, width, coarse);
  add_coarse(haar, coarse);
  add_numbers(haar, coefficients, 2, seeds, stage, stage_number, fastdiff::kExpansionNoise);
  Tensor result = result_of(haar, coarse, channels_last);
  Device::run(haar, HaarOp::expand, coarse);
  return result;
}

template <class Device>
Tensor haar_loss(
    Tensor prediction, Tensor coefficients, Tensor seeds, std::optional<Tensor> stage, int64_t stage_number,
    int64_t levels) {
  Haar haar = sized(levels, prediction);
  haar.image = image_of(prediction);
  add_numbers(haar, coefficients, 2, seeds, stage, stage_number);
  Tensor sums = torch::stable::new_empty(coefficients, {haar.batch});
  Device::reduce(haar, prediction, sums);
  return sums;
}

template <class Device>
Tensor haar_loss_gradient(
    Tensor prediction, Tensor coefficients, Tensor seeds, std::optional<Tensor> stage, int64_t stage_number,
    Tensor upstream, int64_t levels, bool channels_last) {
  Haar haar = sized(levels, prediction);
  haar.image = image_of(prediction);
  add_numbers(haar, coefficients, 2, seeds, stage, stage_number);
  STD_TORCH_CHECK(
      upstream.numel() == haar.batch && upstream.is_contiguous() && (type_of(upstream) == fastdiff::Type::f64) == haar.is_double,
      "haar_loss: a number for each sample");
  haar.upstream = upstream.data_ptr();
  Tensor gradient = result_of(haar, prediction, channels_last);
  Device::run(haar, HaarOp::loss, prediction);
  return gradient;
}

template <class Device, class Library>
void register_all(Library& library) {
  library.impl("haar_split", TORCH_BOX(&haar_split<Device>));
  library.impl("haar_merge", TORCH_BOX(&haar_merge<Device>));
  library.impl("haar_step", TORCH_BOX(&haar_step<Device>));
  library.impl("haar_expand", TORCH_BOX(&haar_expand<Device>));
  library.impl("haar_loss", TORCH_BOX(&haar_loss<Device>));
  library.impl("haar_loss_gradient", TORCH_BOX(&haar_loss_gradient<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) { register_all<Cpu>(library); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, library) { register_all<Cuda>(library); }
#endif
