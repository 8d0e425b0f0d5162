// The kernel, compiled once per instruction set: multistep_step.cpp includes this file in a namespace of its own with
//   FASTDIFF_TARGET        the function attribute that selects the instruction set
//   FASTDIFF_VECTOR_BYTES  the width of its registers
// No include guard, and no includes here.

template <class S>
struct Vector {
  typedef S Type __attribute__((vector_size(FASTDIFF_VECTOR_BYTES)));
};

template <class V, class S>
FASTDIFF_TARGET inline V load(const S* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class S>
FASTDIFF_TARGET inline void store(S* to, V value) {
  memcpy(to, &value, sizeof value);
}

// Past the caches; a vector's `to` is aligned to it. Scalars (the tail of a sample) are stored as usual.
template <class V, class S>
FASTDIFF_TARGET inline void store_streaming(S* to, V value) {
  if constexpr (sizeof(V) != FASTDIFF_VECTOR_BYTES) {
    store(to, value);
  } else {
#if !defined(__SSE2__)
    store(to, value);
#elif FASTDIFF_VECTOR_BYTES == 64
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif FASTDIFF_VECTOR_BYTES == 32
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#endif
  }
}

// One sample's coefficients, and its slots by name. Terms with a zero weight are dropped here, so nothing reads them.
template <class S, int W>
struct Row {
  S p, q, lo, hi, c_in, guidance;
  const S* first;  // read slot 0, for x0
  bool needs_x0, needs_model, needs_noise;
  S x0_weight[W], model_weight[W], noise_weight[W];
  int terms[W];
  S weight[W][kMaxReads];
  const S* slot[W][kMaxReads];
  S* write[W];
  bool stream[W];
};

template <class S, int W>
FASTDIFF_TARGET inline Row<S, W> make_row(const MultistepStep& step, int64_t sample) {
  Row<S, W> row;
  const int reads = step.reads;
  const int64_t length = kRowHead + W * (3 + reads);
  const S* c = static_cast<const S*>(step.coefficients) + (step.row_per_sample ? sample * length : 0);
  S* const slots = static_cast<S*>(step.slots) + sample * step.elements;
  const int32_t* const read = step.index + 2;
  row.p = c[0], row.q = c[1], row.lo = c[2], row.hi = c[3], row.c_in = c[4];
  row.guidance = step.guidance ? static_cast<const S*>(step.guidance)[step.guidance_per_sample ? sample : 0] : S{0};
  row.first = slots + read[0] * step.slot_stride;
  row.needs_x0 = row.needs_model = row.needs_noise = false;
  c += kRowHead;
  for (int w = 0; w < W; ++w, c += 3 + reads) {
    row.x0_weight[w] = c[0], row.model_weight[w] = c[1], row.noise_weight[w] = c[2];
    row.needs_x0 |= c[0] != 0;
    row.needs_model |= c[1] != 0;
    row.needs_noise |= c[2] != 0;
    row.terms[w] = 0;
    for (int r = 0; r < reads; ++r) {
      if (c[3 + r] == 0) continue;
      row.weight[w][row.terms[w]] = c[3 + r];
      row.slot[w][row.terms[w]++] = slots + read[r] * step.slot_stride;
    }
    row.write[w] = slots + read[reads + w] * step.slot_stride;
  }
  row.needs_model |= row.needs_x0 && row.p != 0;
  for (int w = 0; w < W; ++w) {
    bool is_read = row.needs_x0 && row.q != 0 && row.write[w] == row.first;
    for (int v = 0; v < W; ++v)
      for (int t = 0; t < row.terms[v]; ++t) is_read |= row.write[w] == row.slot[v][t];
    // Chunks are whole vectors long: if the sample is aligned, so is each of its chunks.
    const bool aligned = reinterpret_cast<uintptr_t>(row.write[w]) % FASTDIFF_VECTOR_BYTES == 0;
    row.stream[w] = step.stream && aligned && !is_read;
  }
  return row;
}

// The operands of a chunk other than slots, at the chunk's first element; null: zero.
template <class S>
struct Operands {
  const S* model;        // output, or its unconditional half
  const S* conditional;  // null: no guidance
  const S* noise;
  S* scaled;             // receives c_in * new_0; null: not wanted
};

// total += weight * operand, for U vectors.
template <class V, int U, class S>
FASTDIFF_TARGET inline void add(V (&total)[U], S weight, const V (&operand)[U]) {
  for (int u = 0; u < U; ++u) total[u] = total[u] + weight * operand[u];
}

template <class V, int U, class S>
FASTDIFF_TARGET inline void add(V (&total)[U], S weight, const S* operand) {
  for (int u = 0; u < U; ++u) total[u] = total[u] + weight * load<V>(operand + u * (sizeof(V) / sizeof(S)));
}

// Elements [begin, end) of the chunk that starts at element `start` of the sample, U vectors V a turn (V is S itself for
// a tail). Returns where it stopped: less than a turn before `end`.
template <class V, int U, class S, int W>
FASTDIFF_TARGET __attribute__((noinline)) int64_t update(
    const Row<S, W>& row, const Operands<S>& at, int64_t start, int64_t begin, int64_t end) {
  constexpr int lanes = sizeof(V) / sizeof(S);
  const V lo = V{} + row.lo, hi = V{} + row.hi;
  int64_t j = begin;
  for (; j + U * lanes <= end; j += U * lanes) {
    const int64_t i = start + j;
    V model[U] = {}, x0[U] = {}, sum[W][U];
    if (at.model) {
      for (int u = 0; u < U; ++u) model[u] = load<V>(at.model + j + u * lanes);
      if (at.conditional)
        for (int u = 0; u < U; ++u)
          model[u] = model[u] + row.guidance * (load<V>(at.conditional + j + u * lanes) - model[u]);
    }
    if (row.needs_x0) {
      if (row.p != 0) add(x0, row.p, model);
      if (row.q != 0) add(x0, row.q, row.first + i);
      for (int u = 0; u < U; ++u) {
        x0[u] = x0[u] < lo ? lo : x0[u];
        x0[u] = x0[u] > hi ? hi : x0[u];
      }
    }
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w) {
      V total[U] = {};
      // Unrolled, so that every slot has load instructions of its own: processors prefetch by instruction.
#pragma GCC unroll 4
      for (int t = 0; t < row.terms[w]; ++t) add(total, row.weight[w][t], row.slot[w][t] + i);
      if (row.x0_weight[w] != 0) add(total, row.x0_weight[w], x0);
      if (row.model_weight[w] != 0) add(total, row.model_weight[w], model);
      if (row.noise_weight[w] != 0 && at.noise) add(total, row.noise_weight[w], at.noise + j);
      for (int u = 0; u < U; ++u) sum[w][u] = total[u];
    }
#pragma GCC unroll 3
    for (int w = 0; w < W; ++w)
      for (int u = 0; u < U; ++u) {
        S* const to = row.write[w] + i + u * lanes;
        row.stream[w] ? store_streaming(to, sum[w][u]) : store(to, sum[w][u]);
      }
    if (at.scaled)
      for (int u = 0; u < U; ++u) store(at.scaled + j + u * lanes, V(row.c_in * sum[0][u]));
  }
  return j;
}

template <class From, class S>
FASTDIFF_TARGET inline void widen_loop(const void* from, int64_t offset, S* to, int64_t count) {
  const From* source = static_cast<const From*>(from) + offset;
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(widen(source[i]));
}

// `count` values at from + offset as S: in place where the type is S already, else converted into the buffer.
template <class S>
FASTDIFF_TARGET __attribute__((noinline)) const S* view(const void* from, Type type, int64_t offset, S* buffer, int64_t count) {
  if (type == (sizeof(S) == 8 ? Type::f64 : Type::f32)) return static_cast<const S*>(from) + offset;
  switch (type) {
    case Type::f64: widen_loop<double>(from, offset, buffer, count); break;
    case Type::f32: widen_loop<float>(from, offset, buffer, count); break;
    case Type::f16: widen_loop<Half>(from, offset, buffer, count); break;
    case Type::bf16: widen_loop<BFloat16>(from, offset, buffer, count); break;
  }
  return buffer;
}

template <class To, class S>
FASTDIFF_TARGET inline void narrow_loop(const S* from, void* to, int64_t offset, int64_t count) {
  To* target = static_cast<To*>(to) + offset;
  for (int64_t i = 0; i < count; ++i) narrow(from[i], target[i]);
}

template <class S>
FASTDIFF_TARGET __attribute__((noinline)) void write_as(const S* from, void* to, Type type, int64_t offset, int64_t count) {
  switch (type) {
    case Type::f64: return narrow_loop<double>(from, to, offset, count);
    case Type::f32: return narrow_loop<float>(from, to, offset, count);
    case Type::f16: return narrow_loop<Half>(from, to, offset, count);
    case Type::bf16: return narrow_loop<BFloat16>(from, to, offset, count);
  }
}

// 4 * blocks normals of one image, from element 4 * first_block on.
FASTDIFF_TARGET __attribute__((noinline)) void normals(
    uint64_t seed, uint32_t stage, uint32_t purpose, uint64_t first_block, int64_t blocks, float* to) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint32_t low = static_cast<uint32_t>(first_block), high = static_cast<uint32_t>(first_block >> 32);
  uint32_t counter = low;
  for (const float* const end = to + 4 * blocks; to != end; to += 4, ++counter) {
    uint32_t word[4] = {counter, high + (counter < low), stage, purpose};
    philox4x32(word, k0, k1);
    const Pair a = box_muller(word[0], word[1]), b = box_muller(word[2], word[3]);
    to[0] = a.first;
    to[1] = a.second;
    to[2] = b.first;
    to[3] = b.second;
  }
}

constexpr int64_t kNormals = kChunk + 8;  // a chunk's normals, widened to whole Philox blocks at both ends

// The normals of elements [begin, begin + count) of a sample in memory order.
template <class S>
FASTDIFF_TARGET __attribute__((noinline)) void sample_normals(
    const MultistepStep& step, int64_t sample, int64_t begin, int64_t count, S* to) {
  float buffer[kNormals];
  const auto draw = [&](int64_t first, int64_t wanted) {  // logical elements [first, first + wanted)
    const int64_t block = first / 4;
    normals(step.seeds[sample], step.index[0], step.index[1], block, (first + wanted + 3) / 4 - block, buffer);
    return buffer + (first - 4 * block);
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

constexpr int kUnroll = 4;

template <class S, int W>
FASTDIFF_TARGET void run_range(const MultistepStep& step, int64_t begin, int64_t end) {
  using V = typename Vector<S>::Type;
  alignas(64) S model_buffer[kChunk], conditional_buffer[kChunk], noise_buffer[kChunk], scaled_buffer[kChunk];
  const int64_t per_sample = chunks_per_sample(step);
  Row<S, W> row;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / per_sample;
    const int64_t start = (chunk - sample * per_sample) * kChunk;
    const int64_t count = step.elements - start < kChunk ? step.elements - start : kChunk;
    if (chunk == begin || start == 0) row = make_row<S, W>(step, sample);

    Operands<S> at{};
    if (step.output && row.needs_model) {
      const int64_t offset = sample * step.output_stride + start;
      at.model = view(step.output, step.output_type, offset, model_buffer, count);
      if (step.guidance)
        at.conditional = view(
            step.output, step.output_type, offset + step.batch * step.output_stride, conditional_buffer, count);
    }
    if (row.needs_noise && step.seeds) {
      sample_normals(step, sample, start, count, noise_buffer);
      at.noise = noise_buffer;
    } else if (row.needs_noise && step.noise) {
      at.noise = static_cast<const S*>(step.noise) + sample * step.noise_stride + start;
    }
    at.scaled = step.network_input ? scaled_buffer : nullptr;

    const int64_t done = update<V, kUnroll>(row, at, start, 0, count);
    update<S, 1>(row, at, start, done, count);

    for (int copy = 0; copy < (step.network_input ? step.network_input_copies : 0); ++copy) {
      const int64_t offset = (copy * step.batch + sample) * step.network_input_stride + start;
      write_as(scaled_buffer, step.network_input, step.network_input_type, offset, count);
    }
  }
#if defined(__SSE2__)
  if (step.stream) _mm_sfence();
#endif
}

FASTDIFF_TARGET void run(const MultistepStep& step, int64_t begin, int64_t end) {
  const auto by_writes = [&](auto zero) {
    using S = decltype(zero);
    switch (step.writes) {
      case 1: return run_range<S, 1>(step, begin, end);
      case 2: return run_range<S, 2>(step, begin, end);
      default: return run_range<S, 3>(step, begin, end);
    }
  };
  step.is_double ? by_writes(double{}) : by_writes(float{});
}
