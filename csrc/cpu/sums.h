// Weighted sums of arrays, and conversions of what goes in and comes out; every_target.h includes this file once for each
// instruction set. No include guard, and no includes here.

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

constexpr int kMaxTerms = 19;  // the most that any kernel adds up

// A weighted sum of arrays. Terms with a zero weight, or without an operand, are left out: nothing reads them.
template <class S>
struct Sum {
  int terms = 0;
  S weight[kMaxTerms];
  const S* operand[kMaxTerms];

  FASTDIFF_TARGET void add(S by, const S* what) {
    if (by == 0 || !what) return;
    weight[terms] = by;
    operand[terms++] = what;
  }
};

constexpr int64_t kAhead = 512;  // elements

// to[begin, end) = sum, U vectors V a turn (V is S itself for a tail). Returns where less than a turn was left.
template <class V, int U, class S>
FASTDIFF_TARGET inline int64_t evaluate(const Sum<S>& sum, S* to, int64_t begin, int64_t end) {
  constexpr int lanes = sizeof(V) / sizeof(S);
  int64_t i = begin;
  for (; i + U * lanes <= end; i += U * lanes) {
    V total[U] = {};
    for (int t = 0; t < sum.terms; ++t) {
      const S* const operand = sum.operand[t] + i;
      // One load instruction serves every operand, so the processor sees no stream to prefetch; this keeps it ahead.
      for (int u = 0; u < U; ++u) __builtin_prefetch(operand + kAhead + u * lanes, 0, 2);
      for (int u = 0; u < U; ++u) total[u] = total[u] + sum.weight[t] * load<V>(operand + u * lanes);
    }
    for (int u = 0; u < U; ++u) store(to + i + u * lanes, total[u]);
  }
  return i;
}

template <class S>
FASTDIFF_TARGET __attribute__((noinline)) void evaluate(const Sum<S>& sum, S* to, int64_t count) {
  const int64_t done = evaluate<typename Vector<S>::Type, 4>(sum, to, 0, count);
  evaluate<S, 1>(sum, to, done, count);
}

// to[i] within [lo, hi]; NaN stays.
template <class S>
FASTDIFF_TARGET inline void clamp(S* to, S lo, S hi, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const S above = to[i] < lo ? lo : to[i];
    to[i] = above > hi ? hi : above;
  }
}

// Past the caches, if `to` is aligned.
FASTDIFF_TARGET inline void copy_streaming(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  int64_t i = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % FASTDIFF_VECTOR_BYTES == 0) {
    for (; i + FASTDIFF_VECTOR_BYTES <= bytes; i += FASTDIFF_VECTOR_BYTES) {
#if FASTDIFF_VECTOR_BYTES == 64
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#elif FASTDIFF_VECTOR_BYTES == 32
      _mm256_stream_si256(
          reinterpret_cast<__m256i*>(target + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#else
      _mm_stream_si128(
          reinterpret_cast<__m128i*>(target + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
#endif
    }
  }
#endif
  memcpy(target + i, source + i, bytes - i);
}

// Streaming stores come before whatever follows.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
FASTDIFF_TARGET inline void narrow_loop(const S* from, S scale, void* to, int64_t offset, int64_t count) {
  To* target = static_cast<To*>(to) + offset;
  for (int64_t i = 0; i < count; ++i) narrow(scale * from[i], target[i]);
}

// to[offset...] = scale * from, as the type asks.
template <class S>
FASTDIFF_TARGET __attribute__((noinline)) void write_as(
    const S* from, S scale, void* to, Type type, int64_t offset, int64_t count) {
  switch (type) {
    case Type::f64: return narrow_loop<double>(from, scale, to, offset, count);
    case Type::f32: return narrow_loop<float>(from, scale, to, offset, count);
    case Type::f16: return narrow_loop<Half>(from, scale, to, offset, count);
    case Type::bf16: return narrow_loop<BFloat16>(from, scale, to, offset, count);
  }
}
