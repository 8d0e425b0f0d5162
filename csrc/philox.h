// Philox4x32-10 and float32 normals, operation by operation as fastdiff/ops/philox.py defines them.
// Plain scalar code without branches: loops over it vectorise. Compile with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTDIFF_INLINE __host__ __device__ __forceinline__
#define FASTDIFF_UNROLL _Pragma("unroll")
#define FASTDIFF_ROLLED _Pragma("unroll 1")
#else
#ifndef FASTDIFF_INLINE
#define FASTDIFF_INLINE inline __attribute__((always_inline))
#endif
#define FASTDIFF_UNROLL _Pragma("GCC unroll 16")
#define FASTDIFF_ROLLED
#endif

namespace fastdiff {

FASTDIFF_INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FASTDIFF_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTDIFF_INLINE void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
  FASTDIFF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

struct Pair {
  float first, second;
};

FASTDIFF_INLINE Pair box_muller(uint32_t u, uint32_t w) {
  const uint32_t v = u + 1;
  const int32_t v_signed = static_cast<int32_t>(v);
  float g = static_cast<float>(v_signed);
  g = v_signed <= 0 ? g + 4294967296.0f : g;
  const uint32_t b = (as_bits(g) + 0x004AFB0Du) >> 23;
  const uint32_t k = b - 127;
  const float d = static_cast<float>(static_cast<int32_t>(v - ((1u ^ (k >> 5)) << (k & 31))));
  const float f = d * as_float((254 - b) << 23);
  float h = -0x1.38cf20p-4f;
  h = h * f + 0x1.05602ep-3f;
  h = h * f + -0x1.0d81f2p-3f;
  h = h * f + 0x1.22d8f8p-3f;
  h = h * f + -0x1.54728cp-3f;
  h = h * f + 0x1.99a01ep-3f;
  h = h * f + -0x1.000226p-2f;
  h = h * f + 0x1.555554p-2f;
  const float f2 = f * f;
  const float y = (f2 * f) * h - 0.5f * f2;
  const float n = static_cast<float>(static_cast<int32_t>(32 - k));
  const float t = n * 0x1.62e400p-1f - (f + (y - n * 0x1.7f7d1cp-20f));
#ifdef __CUDA_ARCH__
  const float r = __fsqrt_rn(t + t);
#else
  const float r = std::sqrt(t + t);
#endif

  const int32_t a = static_cast<int32_t>(w << 2) >> 2;
  const uint32_t q = (w + 0x20000000u) >> 30;
  const float x = static_cast<float>(a) * 0x1p-29f;
  const float x2 = x * x;
  const float s = x * (((-0x1.32f65cp-15f * x2 + 0x1.467fdcp-9f) * x2 + -0x1.4abc22p-4f) * x2 + 0x1.921fb6p-1f);
  const float c =
      (((0x1.d4f7eap-19f * x2 + -0x1.55b2b6p-12f) * x2 + 0x1.03c1b0p-6f) * x2 + -0x1.3bd3ccp-2f) * x2 + 1.0f;
  const uint32_t cosine = (q & 1) ? as_bits(s) : as_bits(c);
  const uint32_t sine = (q & 1) ? as_bits(c) : as_bits(s);
  return {r * as_float(cosine ^ ((q ^ (q >> 1)) << 31)), r * as_float(sine ^ ((q >> 1) << 31))};
}

}  // namespace fastdiff
