// float16 to float32, and float16 times float32, for a run of elements: by F16C where the
// processor has it. Exact, but for the product's one rounding to nearest even.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastclip::cpu {

#if defined(__x86_64__)
[[gnu::target("avx,f16c")]] inline __m256 load_f16c(const c10::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

[[gnu::target("avx,f16c")]] inline int64_t decode_f16c(const c10::Half* from, float* to,
                                                       int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, load_f16c(from + i));
  return i;
}

[[gnu::target("avx,f16c")]] inline int64_t multiply_f16c(c10::Half* x, float coef, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 product = _mm256_mul_ps(load_f16c(x + i), _mm256_set1_ps(coef));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i),
                     _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
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

inline void multiply(c10::Half* x, float coef, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) i = multiply_f16c(x, coef, n);
#endif
  for (; i < n; ++i) x[i] = c10::Half(static_cast<float>(x[i]) * coef);
}

}  // namespace fastclip::cpu
