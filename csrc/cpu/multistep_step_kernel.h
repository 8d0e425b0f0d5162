// The kernel, compiled once per instruction set by every_target.h. No include guard, and no includes here.

static_assert(kMaxReads + kRowEach <= kMaxTerms, "a sum holds every slot read, x0, the output and noise");

constexpr int64_t kNormals = kChunk + 8;  // a chunk's normals, widened to whole Philox blocks at both ends

// The normals of elements [begin, begin + count) of a sample in memory order.
template <class S>
FASTDIFF_TARGET __attribute__((noinline)) void sample_normals(
    const MultistepStep& step, int64_t sample, int64_t begin, int64_t count, S* to) {
  float buffer[kNormals];
  const auto draw = [&](int64_t first, int64_t wanted) {  // logical elements [first, first + wanted)
    return normals(step.seeds[sample], step.index[0], step.index[1], first, wanted, buffer);
  };
  if (step.channels == 1) {
    const float* z = draw(begin, count);
    for (int64_t i = 0; i < count; ++i) to[i] = z[i];
    return;
  }
  const int64_t channels = step.channels, positions = step.elements / channels;
  const int64_t first = begin / channels, last = (begin + count + channels - 1) / channels;
  for (int64_t c = 0; c < channels; ++c) {
    const float* z = draw(c * positions + first, last - first);
    for (int64_t position = first; position < last; ++position) {
      const int64_t i = position * channels + c - begin;
      if (i >= 0 && i < count) to[i] = z[position - first];
    }
  }
}

// The operands of one chunk, in memory of their own where they are not read in place.
template <class S>
struct Buffers {
  alignas(64) S model[kChunk], conditional[kChunk], x0[kChunk], noise[kChunk], result[kMaxWrites][kChunk];
};

// Elements [start, start + count) of a sample. All reads come before the first write.
template <class S>
FASTDIFF_TARGET void run_chunk(
    const MultistepStep& step, int64_t sample, int64_t start, int64_t count, Buffers<S>& buffers) {
  const int reads = step.reads, writes = step.writes, width = kRowEach + reads;
  const S* const row =
      static_cast<const S*>(step.coefficients) + (step.row_per_sample ? sample * (kRowHead + writes * width) : 0);
  const S p = row[0], q = row[1], lo = row[2], hi = row[3], c_in = row[4];
  const S* const weights = row + kRowHead;  // of write w: weights[w * width + ...] = x0, model, noise, slots
  const auto needed = [&](int operand) {
    for (int w = 0; w < writes; ++w)
      if (weights[w * width + operand] != 0) return true;
    return false;
  };
  const bool needs_x0 = needed(0);
  S* const slots = static_cast<S*>(step.slots) + sample * step.elements + start;
  const auto slot = [&](int i) { return slots + step.index[kIndexHead + i] * step.slot_stride; };

  const S* model = nullptr;
  if (step.output && (needed(1) || (needs_x0 && p != 0))) {
    const int64_t offset = sample * step.output_stride + start;
    model = view(step.output, step.output_type, offset, buffers.model, count);
    if (step.guidance) {
      const S scale = static_cast<const S*>(step.guidance)[step.guidance_per_sample ? sample : 0];
      const int64_t half = step.batch * step.output_stride;
      const S* conditional = view(step.output, step.output_type, offset + half, buffers.conditional, count);
      for (int64_t i = 0; i < count; ++i) buffers.model[i] = model[i] + scale * (conditional[i] - model[i]);
      model = buffers.model;
    }
  }

  const S* x0 = nullptr;
  if (needs_x0) {
    Sum<S> sum;
    sum.add(p, model);
    sum.add(q, slot(0));
    evaluate(sum, buffers.x0, count);
    clamp(buffers.x0, lo, hi, count);
    x0 = buffers.x0;
  }

  const S* noise = nullptr;
  if (needed(2) && step.seeds) {
    sample_normals(step, sample, start, count, buffers.noise);
    noise = buffers.noise;
  } else if (step.noise) {
    noise = static_cast<const S*>(step.noise) + sample * step.noise_stride + start;
  }

  bool is_read[kMaxWrites] = {};
  for (int w = 0; w < writes; ++w) {
    const S* const weight = weights + w * width;
    Sum<S> sum;
    for (int r = 0; r < reads; ++r) sum.add(weight[kRowEach + r], slot(r));
    for (int t = 0; t < sum.terms; ++t)
      for (int v = 0; v < writes; ++v) is_read[v] |= sum.operand[t] == slot(reads + v);
    sum.add(weight[0], x0);
    sum.add(weight[1], model);
    sum.add(weight[2], noise);
    evaluate(sum, buffers.result[w], count);
  }

  for (int w = 0; w < writes; ++w) {
    S* const to = slot(reads + w);
    if (step.stream && !is_read[w])
      copy_streaming(buffers.result[w], to, count * sizeof(S));
    else
      memcpy(to, buffers.result[w], count * sizeof(S));
  }
  for (int copy = 0; copy < step.network_input_copies; ++copy) {
    const int64_t offset = (copy * step.batch + sample) * step.network_input_stride + start;
    write_as(buffers.result[0], c_in, step.network_input, step.network_input_type, offset, count);
  }
}

template <class S>
FASTDIFF_TARGET void run_range(const MultistepStep& step, int64_t begin, int64_t end) {
  Buffers<S> buffers;
  const int64_t per_sample = chunks_per_sample(step);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / per_sample, start = (chunk - sample * per_sample) * kChunk;
    const int64_t rest = step.elements - start;
    run_chunk(step, sample, start, rest < kChunk ? rest : kChunk, buffers);
  }
  if (step.stream) finish_streaming();
}

FASTDIFF_TARGET void run(const MultistepStep& step, int64_t begin, int64_t end) {
  step.is_double ? run_range<double>(step, begin, end) : run_range<float>(step, begin, end);
}
