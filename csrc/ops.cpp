// The solver's operators for CPU tensors.
#include <optional>
#include <vector>

#include "multistep_step.h"
#include "tensors.h"
#include "weighted_sums.h"

namespace {

using fastdiff::kElementsPerThread;
using fastdiff::kRandomElementsPerThread;
using fastdiff::kStreamBytes;
using fastdiff::Tensor;
using fastdiff::type_of;

// How many channels lie side by side in memory: 1 for contiguous samples, C for channels_last ones.
int64_t interleaved_channels(const Tensor& slots) {
  int64_t expected = 1;
  for (int64_t dim = slots.dim() - 1; dim >= 2; --dim) {
    if (slots.size(dim) != 1 && slots.stride(dim) != expected) return slots.size(2);
    expected *= slots.size(dim);
  }
  return 1;
}

void multistep_step(
    Tensor slots,
    std::optional<Tensor> output,
    Tensor coefficients,
    Tensor index,
    std::optional<Tensor> guidance,
    std::optional<Tensor> seeds,
    std::optional<Tensor> noise,
    std::optional<Tensor> network_input,
    int64_t reads,
    int64_t writes) {
  STD_TORCH_CHECK(
      reads >= 1 && reads <= fastdiff::kMaxReads && writes >= 1 && writes <= fastdiff::kMaxWrites &&
          index.numel() == fastdiff::kIndexHead + reads + writes,
      "multistep_step: index must hold 2 + reads + writes numbers");
  fastdiff::MultistepStep step{};
  const int64_t count = slots.size(0), elements_and_batch = slots.numel();
  if (elements_and_batch == 0) return;
  step.slots = slots.data_ptr();
  step.slot_stride = slots.stride(0);
  step.is_double = type_of(slots) == fastdiff::Type::f64;
  step.batch = slots.size(1);
  step.elements = elements_and_batch / (count * step.batch);
  step.channels = interleaved_channels(slots);
  step.coefficients = coefficients.data_ptr();
  step.row_per_sample = coefficients.size(0) > 1;
  step.index = static_cast<const int32_t*>(index.data_ptr());
  step.reads = static_cast<int>(reads);
  step.writes = static_cast<int>(writes);
  for (int64_t i = fastdiff::kIndexHead; i < fastdiff::kIndexHead + reads + writes; ++i) {
    STD_TORCH_CHECK(
        step.index[i] >= 0 && step.index[i] < count, "multistep_step: index names slot ", step.index[i], ", but slots has ", count);
  }
  if (output) {
    step.output = output->data_ptr();
    step.output_stride = output->stride(0);
    step.output_type = type_of(*output);
  }
  if (guidance) {
    step.guidance = guidance->data_ptr();
    step.guidance_per_sample = guidance->numel() > 1;
  }
  if (seeds) step.seeds = static_cast<const int64_t*>(seeds->data_ptr());
  if (noise) {
    step.noise = noise->data_ptr();
    step.noise_stride = noise->stride(0);
  }
  if (network_input) {
    step.network_input = network_input->data_ptr();
    step.network_input_stride = network_input->stride(0);
    step.network_input_type = type_of(*network_input);
    step.network_input_copies = static_cast<int>(network_input->size(0) / step.batch);
  }

  const int64_t chunks = step.batch * fastdiff::chunks_per_sample(step);
  const int64_t bytes = step.batch * step.elements * (step.is_double ? 8 : 4);
  step.stream = bytes * (reads + writes) > kStreamBytes;
  const int64_t grain = (seeds ? kRandomElementsPerThread : kElementsPerThread) / fastdiff::kChunk;
  torch::stable::parallel_for(
      0, chunks, grain, [&](int64_t begin, int64_t end) { fastdiff::cpu::multistep_step(step, begin, end); });
}

fastdiff::Array array_of(const Tensor& tensor) { return {tensor.data_ptr(), type_of(tensor)}; }

void weighted_sums(
    std::vector<Tensor> operands, Tensor weights, std::optional<Tensor> clamp, std::vector<Tensor> results) {
  const int64_t count = operands.size(), width = count + (clamp ? 1 : 0);
  STD_TORCH_CHECK(
      count >= 1 && count <= fastdiff::kMaxOperands && !results.empty() && results.size() <= fastdiff::kMaxSums &&
          weights.numel() == static_cast<int64_t>(results.size()) * width && (!clamp || clamp->numel() == 2 + count),
      "weighted_sums: weights must hold a number for each result and operand");
  fastdiff::WeightedSums sums{};
  sums.elements = results[0].numel();
  if (sums.elements == 0) return;
  int64_t bytes = 0;
  const auto add = [&](fastdiff::Array* arrays, int& number, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() == sums.elements, "weighted_sums: operands and results must have one shape");
    arrays[number] = array_of(tensor);
    bytes += sums.elements * fastdiff::size_of(arrays[number++].type);
  };
  for (const Tensor& operand : operands) add(sums.operand, sums.operands, operand);
  for (const Tensor& result : results) add(sums.result, sums.sums, result);
  sums.is_double = type_of(weights) == fastdiff::Type::f64;
  sums.weights = weights.data_ptr();
  if (clamp) sums.clamp = clamp->data_ptr();
  sums.stream = bytes > kStreamBytes;
  torch::stable::parallel_for(
      0, fastdiff::chunks(sums), kElementsPerThread / fastdiff::kChunk,
      [&](int64_t begin, int64_t end) { fastdiff::cpu::weighted_sums(sums, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, library) {
  library.impl("multistep_step", TORCH_BOX(&multistep_step));
  library.impl("weighted_sums", TORCH_BOX(&weighted_sums));
}
