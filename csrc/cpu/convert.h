// float16 and bfloat16 to and from float32, rounding to nearest even. Branch-free, so loops over these vectorise.
#pragma once

#include "../philox.h"  // as_bits, as_float

namespace fastdiff::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTDIFF_INLINE float widen(float value) { return value; }
FASTDIFF_INLINE double widen(double value) { return value; }
FASTDIFF_INLINE float widen(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }

FASTDIFF_INLINE float widen(Half value) {
  const uint32_t magnitude = uint32_t{value.bits & 0x7FFFu} << 13;
  const uint32_t bias = 112u << 23;                      // difference of the exponent biases
  const uint32_t normal = magnitude + bias;
  const uint32_t special = normal + bias;                // inf and NaN: exponent 31 becomes 255
  const uint32_t subnormal = as_bits(as_float(normal + (1u << 23)) - 0x1p-14f);
  uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return as_float(bits | uint32_t{value.bits & 0x8000u} << 16);
}

FASTDIFF_INLINE void narrow(float value, float& to) { to = value; }
FASTDIFF_INLINE void narrow(double value, float& to) { to = static_cast<float>(value); }
FASTDIFF_INLINE void narrow(float value, double& to) { to = value; }
FASTDIFF_INLINE void narrow(double value, double& to) { to = value; }

FASTDIFF_INLINE void narrow(float value, BFloat16& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTDIFF_INLINE void narrow(float value, Half& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);  // 0.5f has half's smallest step
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? 0x7C00u : half;
  half = magnitude > 0x7F800000u ? 0x7E00u : half;
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// As PyTorch does: float64 goes to the half types through float32.
FASTDIFF_INLINE void narrow(double value, BFloat16& to) { narrow(static_cast<float>(value), to); }
FASTDIFF_INLINE void narrow(double value, Half& to) { narrow(static_cast<float>(value), to); }

}  // namespace fastdiff::cpu
