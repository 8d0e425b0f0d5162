#include <cstdlib>
#include <cstring>

#include "../common.h"

namespace fastdiff::cpu {

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Target choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("FASTDIFF_CPU_TARGET");
  const auto allowed = [&](Target target) {
    return !asked || std::strcmp(asked, kNames[static_cast<int>(target)]) == 0;
  };
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (allowed(Target::avx512) && has_avx512) return Target::avx512;
  if (allowed(Target::avx2) && __builtin_cpu_supports("avx2")) return Target::avx2;
#endif
  return Target::baseline;
}

}  // namespace

Target target() {
  static const Target target = choose();
  return target;
}

const char* target_name() { return kNames[static_cast<int>(target())]; }

}  // namespace fastdiff::cpu
