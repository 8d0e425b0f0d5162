// The kernel, compiled once per instruction set by every_target.h. No include guard, and no includes here.

static_assert(kMaxOperands + 1 <= kMaxTerms, "a sum holds every operand and the clamped value");

// What one chunk needs beside the tensors: converted operands, and sums on their way to another type or past the caches.
template <class S>
struct SumBuffers {
  alignas(64) S operand[kMaxOperands][kChunk], clamped[kChunk], total[kChunk];
  alignas(64) char cast[kChunk * sizeof(double)];
};

// result[start, start + count) = sum.
template <class S>
FASTDIFF_TARGET inline void write_sum(
    const Sum<S>& sum, const Array& result, int64_t start, int64_t count, bool stream, SumBuffers<S>& buffers) {
  const bool converts = result.type != (sizeof(S) == 8 ? Type::f64 : Type::f32);
  if (!converts && !stream) return evaluate(sum, static_cast<S*>(result.data) + start, count);
  evaluate(sum, buffers.total, count);
  if (!stream) return write_as(buffers.total, S{1}, result.data, result.type, start, count);
  const void* from = buffers.total;
  if (converts) {
    write_as(buffers.total, S{1}, buffers.cast, result.type, 0, count);
    from = buffers.cast;
  }
  const int64_t size = size_of(result.type);
  copy_streaming(from, static_cast<char*>(result.data) + start * size, count * size);
}

// Elements [start, start + count).
template <class S>
FASTDIFF_TARGET void sum_chunk(const WeightedSums& sums, int64_t start, int64_t count, SumBuffers<S>& buffers) {
  const int operands = sums.operands, width = operands + (sums.clamp ? 1 : 0);
  const S* const weights = static_cast<const S*>(sums.weights);
  const auto needed = [&](int column) {
    for (int w = 0; w < sums.sums; ++w)
      if (weights[w * width + column] != 0) return true;
    return false;
  };
  const S* const limits = sums.clamp && needed(operands) ? static_cast<const S*>(sums.clamp) : nullptr;
  const S* const factors = limits ? limits + 2 : nullptr;

  const S* operand[kMaxOperands] = {};
  for (int j = 0; j < operands; ++j)
    if (needed(j) || (factors && factors[j] != 0))
      operand[j] = view(sums.operand[j].data, sums.operand[j].type, start, buffers.operand[j], count);

  if (limits) {
    Sum<S> sum;
    for (int j = 0; j < operands; ++j) sum.add(factors[j], operand[j]);
    evaluate(sum, buffers.clamped, count);
    clamp(buffers.clamped, limits[0], limits[1], count);
  }
  for (int w = 0; w < sums.sums; ++w) {
    const S* const weight = weights + w * width;
    Sum<S> sum;
    for (int j = 0; j < operands; ++j) sum.add(weight[j], operand[j]);
    if (limits) sum.add(weight[operands], buffers.clamped);
    write_sum(sum, sums.result[w], start, count, sums.stream, buffers);
  }
}

template <class S>
FASTDIFF_TARGET void sum_range(const WeightedSums& sums, int64_t begin, int64_t end) {
  SumBuffers<S> buffers;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t start = chunk * kChunk, rest = sums.elements - start;
    sum_chunk(sums, start, rest < kChunk ? rest : kChunk, buffers);
  }
  if (sums.stream) finish_streaming();
}

FASTDIFF_TARGET void run(const WeightedSums& sums, int64_t begin, int64_t end) {
  sums.is_double ? sum_range<double>(sums, begin, end) : sum_range<float>(sums, begin, end);
}
