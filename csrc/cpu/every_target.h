// Compiles one kernel source for the architecture's baseline and, on x86-64, for AVX2 and AVX-512. A .cpp file defines
// FASTDIFF_KERNEL, a file that defines run(...), and includes this; chosen_run() is the machine's. No include guard.
//
// The kernel file sees sums.h, normals.h and
//   FASTDIFF_TARGET        the function attribute that selects the instruction set
//   FASTDIFF_VECTOR_BYTES  the width of its registers
// It has no include guard and includes nothing.
#include <cstring>

#include "../common.h"
#include "convert.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastdiff::cpu {

#define FASTDIFF_TARGET
#define FASTDIFF_VECTOR_BYTES 16
namespace baseline {
#include "sums.h"
#include "normals.h"
#include FASTDIFF_KERNEL
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES

#if defined(__x86_64__)
#define FASTDIFF_TARGET __attribute__((target("avx2")))
#define FASTDIFF_VECTOR_BYTES 32
namespace avx2 {
#include "sums.h"
#include "normals.h"
#include FASTDIFF_KERNEL
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES

#define FASTDIFF_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define FASTDIFF_VECTOR_BYTES 64
namespace avx512 {
#include "sums.h"
#include "normals.h"
#include FASTDIFF_KERNEL
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES
#endif

namespace {

auto chosen_run() {
#if defined(__x86_64__)
  if (target() == Target::avx512) return avx512::run;
  if (target() == Target::avx2) return avx2::run;
#endif
  return baseline::run;
}

}  // namespace

}  // namespace fastdiff::cpu
