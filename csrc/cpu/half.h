// float16 <-> float32 for a run of elements, by F16C where the processor has it. Both ways are
// exact but for one rounding to nearest even on the way down.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastclip::cpu {

#if defined(__x86_64__)
[[gnu::target("f16c")]] inline int64_t decode_f16c(const c10::Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
  }
  return i;
}

[[gnu::target("f16c")]] inline int64_t encode_f16c(const float* from, c10::Half* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
  return i;
}
#endif

inline void decode(const c10::Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) i = decode_f16c(from, to, n);
#endif
  for (; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

inline void encode(const float* from, c10::Half* to, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) i = encode_f16c(from, to, n);
#endif
  for (; i < n; ++i) to[i] = c10::Half(from[i]);
}

}  // namespace fastclip::cpu
