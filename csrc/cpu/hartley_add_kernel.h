// A row of images at a time; every_target.h includes this file once for each instruction set. No include guard, and no
// includes here.

// An image may be moved in place, y being x. Then each number is read before it is written, and no other is touched: a
// loop may be vectorised, which the compiler cannot know.
#define FASTDIFF_EACH_BY_ITSELF _Pragma("GCC ivdep")

// y = x + row p of the Hartley spectrum, from the half spectrum's rows p and -p; x may be null.
template <class S, class T>
FASTDIFF_TARGET inline void dense_row(
    const S* __restrict__ own, const S* __restrict__ mirror, const T* x, T* y, int64_t width) {
  const int64_t left = (width + 1) / 2, right = width / 2;
  if (x) {
    FASTDIFF_EACH_BY_ITSELF
    for (int64_t j = 0; j < left; ++j) narrow(static_cast<S>(widen(x[j])) + (own[2 * j] - own[2 * j + 1]), y[j]);
    FASTDIFF_EACH_BY_ITSELF
    for (int64_t j = 1; j <= right; ++j)
      narrow(static_cast<S>(widen(x[width - j])) + (mirror[2 * j] + mirror[2 * j + 1]), y[width - j]);
  } else {
    for (int64_t j = 0; j < left; ++j) narrow(own[2 * j] - own[2 * j + 1], y[j]);
    for (int64_t j = 1; j <= right; ++j) narrow(mirror[2 * j] + mirror[2 * j + 1], y[width - j]);
  }
}

// The same where neighbours are apart; change: room for a row.
template <class S, class T>
FASTDIFF_TARGET inline void strided_row(
    const S* __restrict__ own, const S* __restrict__ mirror, const T* x, int64_t x_step, T* y,
    int64_t y_step, int64_t width, S* __restrict__ change) {
  dense_row<S, S>(own, mirror, nullptr, change, width);
  if (x) {
    FASTDIFF_EACH_BY_ITSELF
    for (int64_t j = 0; j < width; ++j) narrow(static_cast<S>(widen(x[j * x_step])) + change[j], y[j * y_step]);
  } else {
    for (int64_t j = 0; j < width; ++j) narrow(change[j], y[j * y_step]);
  }
}

template <class S, class T>
FASTDIFF_TARGET void run_as(const HartleyAdd& add, int64_t begin, int64_t end) {
  const int64_t row = 2 * (add.width / 2 + 1);  // numbers of a half spectrum's
  std::vector<S> change(add.width);
  const int64_t x_step = add.x_strides[3], y_step = add.y_strides[3];
  const bool dense = y_step == 1 && (!add.x || x_step == 1);
  for (int64_t index = begin, last; index < end; index = last) {  // by images: no division a row
    const int64_t image = index / add.height, first = image * add.height;
    last = first + add.height < end ? first + add.height : end;
    const int64_t sample = image / add.channels, channel = image % add.channels;
    const S* const half = static_cast<const S*>(add.spectrum) + row * first;
    const T* x = add.x ? static_cast<const T*>(add.x) + sample * add.x_strides[0] + channel * add.x_strides[1] : nullptr;
    T* const y = static_cast<T*>(add.y) + sample * add.y_strides[0] + channel * add.y_strides[1];
    for (int64_t p = index - first; p < last - first; ++p) {
      const S *const own = half + row * p, *const mirror = half + row * (p == 0 ? 0 : add.height - p);
      const T* const from = x ? x + p * add.x_strides[2] : nullptr;
      T* const to = y + p * add.y_strides[2];
      if (dense)
        dense_row(own, mirror, from, to, add.width);
      else
        strided_row(own, mirror, from, x_step, to, y_step, add.width, change.data());
    }
  }
}

FASTDIFF_TARGET void run(const HartleyAdd& add, int64_t begin, int64_t end) {
  if (add.is_double) return run_as<double, double>(add, begin, end);
  switch (add.type) {
    case Type::f32: return run_as<float, float>(add, begin, end);
    case Type::f16: return run_as<float, Half>(add, begin, end);
    case Type::bf16: return run_as<float, BFloat16>(add, begin, end);
    case Type::f64: return;  // its arithmetic is float64
  }
}

#undef FASTDIFF_EACH_BY_ITSELF
