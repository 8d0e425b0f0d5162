// A row of images at a time; every_target.h includes this file once for each instruction set. No include guard, and no
// includes here.

// Row p of the Hartley spectrum, from the half spectrum's rows p and -p.
template <class S>
FASTDIFF_TARGET inline void hartley_row(
    const S* __restrict__ own, const S* __restrict__ mirror, S* __restrict__ to, int64_t width) {
  for (int64_t j = 0; j < (width + 1) / 2; ++j) to[j] = own[2 * j] - own[2 * j + 1];
  for (int64_t j = 1; j <= width / 2; ++j) to[width - j] = mirror[2 * j] + mirror[2 * j + 1];
}

template <class S, class T>
FASTDIFF_TARGET inline void add_row(
    const T* x, int64_t x_step, const S* __restrict__ change, T* __restrict__ y, int64_t y_step, int64_t width) {
  if (!x && y_step == 1) {
    for (int64_t j = 0; j < width; ++j) narrow(change[j], y[j]);
  } else if (!x) {
    for (int64_t j = 0; j < width; ++j) narrow(change[j], y[j * y_step]);
  } else if (x_step == 1 && y_step == 1) {
    for (int64_t j = 0; j < width; ++j) narrow(static_cast<S>(widen(x[j])) + change[j], y[j]);
  } else {
    for (int64_t j = 0; j < width; ++j) narrow(static_cast<S>(widen(x[j * x_step])) + change[j], y[j * y_step]);
  }
}

template <class S, class T>
FASTDIFF_TARGET void run_as(const HartleyAdd& add, int64_t begin, int64_t end) {
  const int64_t columns = add.width / 2 + 1;
  const S* const spectrum = static_cast<const S*>(add.spectrum);
  std::vector<S> change(add.width);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / add.height, p = index % add.height;
    const int64_t sample = image / add.channels, channel = image % add.channels;
    const auto offset = [&](const int64_t* strides) {
      return sample * strides[0] + channel * strides[1] + p * strides[2];
    };
    const S* const of_image = spectrum + 2 * columns * add.height * image;
    const int64_t mirror = p == 0 ? 0 : add.height - p;
    hartley_row(of_image + 2 * columns * p, of_image + 2 * columns * mirror, change.data(), add.width);
    add_row(
        add.x ? static_cast<const T*>(add.x) + offset(add.x_strides) : nullptr, add.x_strides[3], change.data(),
        static_cast<T*>(add.y) + offset(add.y_strides), add.y_strides[3], add.width);
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
