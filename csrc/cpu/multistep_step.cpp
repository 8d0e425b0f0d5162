// multistep_step on the CPU: one kernel source, compiled for the architecture's baseline and, on x86-64, for AVX2 and
// AVX-512; the machine decides at run time.
#include "../multistep_step.h"

#include <cstdlib>
#include <cstring>

#include "convert.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastdiff::cpu {

#define FASTDIFF_TARGET
#define FASTDIFF_VECTOR_BYTES 16
namespace baseline {
#include "multistep_step_kernel.h"
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES

#if defined(__x86_64__)
#define FASTDIFF_TARGET __attribute__((target("avx2")))
#define FASTDIFF_VECTOR_BYTES 32
namespace avx2 {
#include "multistep_step_kernel.h"
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES

#define FASTDIFF_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define FASTDIFF_VECTOR_BYTES 64
namespace avx512 {
#include "multistep_step_kernel.h"
}
#undef FASTDIFF_TARGET
#undef FASTDIFF_VECTOR_BYTES
#endif

namespace {

struct Target {
  const char* name;
  void (*run)(const MultistepStep&, int64_t, int64_t);
};

Target choose() {
  const Target baseline{"baseline", baseline::run};
#if defined(__x86_64__)
  const char* asked = std::getenv("FASTDIFF_CPU_TARGET");
  const auto allowed = [&](const char* name) { return !asked || std::strcmp(asked, name) == 0; };
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allowed("avx512") && has_avx512) return {"avx512", avx512::run};
  if (allowed("avx2") && __builtin_cpu_supports("avx2")) return {"avx2", avx2::run};
#endif
  return baseline;
}

const Target& chosen() {
  static const Target target = choose();
  return target;
}

}  // namespace

void multistep_step(const MultistepStep& step, int64_t begin, int64_t end) { chosen().run(step, begin, end); }

const char* target() { return chosen().name; }

}  // namespace fastdiff::cpu
