// Sums and products of float16 elements, by F16C where an x86 processor has it, by NEON on ARM.
// Sums are accumulated in float64; products are rounded once, to nearest even.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastclip::cpu {

#if defined(__x86_64__)
[[gnu::target("avx,f16c")]] inline __m256 load_f16c(const c10::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// The sum, in float64, of the squares or magnitudes of the elements up to the last multiple of 32.
// Adds the number of these elements to `done`.
template <bool kSquares>
[[gnu::target("avx,fma,f16c")]] inline double sum_f16c(const c10::Half* x, int64_t n,
                                                       int64_t& done) {
  __m256d acc[8] = {};
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (; done + 32 <= n; done += 32) {
    for (int k = 0; k < 4; ++k) {
      __m256 values = load_f16c(x + done + 8 * k);
      if (!kSquares) values = _mm256_and_ps(values, magnitude);
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
      const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
      acc[2 * k] = kSquares ? _mm256_fmadd_pd(low, low, acc[2 * k]) : acc[2 * k] + low;
      acc[2 * k + 1] =
          kSquares ? _mm256_fmadd_pd(high, high, acc[2 * k + 1]) : acc[2 * k + 1] + high;
    }
  }
  for (int width = 4; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) acc[k] = _mm256_add_pd(acc[k], acc[k + width]);
  alignas(32) double sums[4];
  _mm256_store_pd(sums, acc[0]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

[[gnu::target("avx,f16c")]] inline int64_t multiply_f16c(c10::Half* x, float coef, int64_t n) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= n; i += 8) {
    const __m256 product = _mm256_mul_ps(load_f16c(x + i), _mm256_set1_ps(coef));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x + i),
                     _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
  }
  return i;
}
#elif defined(__aarch64__)
// The compiler vectorises the sums by itself, but not the conversion to float16.
inline int64_t multiply_neon(c10::Half* x, float coef, int64_t n) {
  auto* bits = reinterpret_cast<uint16_t*>(x);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 4 <= n; i += 4) {
    const float32x4_t values = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(bits + i)));
    const float16x4_t products = vcvt_f16_f32(vmulq_n_f32(values, coef));
    vst1_u16(bits + i, vreinterpret_u16_f16(products));
  }
  return i;
}
#endif

// Sets `done`; returns the float64 sum of squares or magnitudes of the first `done` elements.
template <bool kSquares>
inline double sum_first([[maybe_unused]] const c10::Half* x, [[maybe_unused]] int64_t n,
                        int64_t& done) {
  done = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma"))
    return sum_f16c<kSquares>(x, n, done);
#endif
  return 0;
}

inline void multiply(c10::Half* x, float coef, int64_t n) {
  int64_t i = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("f16c")) i = multiply_f16c(x, coef, n);
#elif defined(__aarch64__)
  i = multiply_neon(x, coef, n);
#endif
  for (; i < n; ++i) x[i] = c10::Half(static_cast<float>(x[i]) * coef);
}

}  // namespace fastclip::cpu
