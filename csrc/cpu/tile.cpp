// The loops over one tile, written so that the compiler vectorises them, and compiled for three
// generations of x86-64. Only other files call the functions for these loops: g++ 12 rejects
// `target_clones` on a function that is called in the file that defines it.
#include "tile.h"

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "half.h"

namespace fastclip::cpu {
namespace {

// Enough independent accumulators to hide the latency of an addition at any vector width.
constexpr int64_t kLanes = 32;

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline double widen(double x) { return x; }
[[gnu::always_inline]] inline float widen(c10::BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
[[gnu::always_inline]] inline float widen(c10::Half x) { return static_cast<float>(x); }

[[gnu::always_inline]] inline c10::BFloat16 round_to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u), c10::BFloat16::from_bits()};
}

template <Norm kind, class acc_t>
[[gnu::always_inline]] inline acc_t term(acc_t x) {
  return kind == Norm::kSquares ? x * x : std::abs(x);
}

// The sum of the lanes, as a tree: a chain of additions would take longer than reading a small
// tensor.
[[gnu::always_inline]] inline double sum_lanes(const double (&acc)[kLanes]) {
  double x[8];
  for (int64_t j = 0; j < 8; ++j) x[j] = (acc[j] + acc[j + 8]) + (acc[j + 16] + acc[j + 24]);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

template <Norm kind, class scalar_t>
[[gnu::always_inline]] inline double sum_wide(const scalar_t* x, int64_t n) {
  double acc[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) acc[j] += term<kind>(static_cast<double>(widen(x[i + j])));
  double total = sum_lanes(acc);
  for (; i < n; ++i) total += term<kind>(static_cast<double>(widen(x[i])));
  return total;
}

// Reads two elements as one 32-bit word: shifting or masking out one half of the word leaves the
// other as a float32, so that no shuffle is needed.
template <Norm kind>
[[gnu::always_inline]] inline double sum_bfloat16(const c10::BFloat16* x, int64_t n) {
  double low[kLanes] = {}, high[kLanes] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      uint32_t word;
      std::memcpy(&word, x + i + 2 * j, sizeof(word));
      low[j] += term<kind>(static_cast<double>(std::bit_cast<float>(word << 16)));
      high[j] += term<kind>(static_cast<double>(std::bit_cast<float>(word & 0xffff0000u)));
    }
  }
  return sum_lanes(low) + sum_lanes(high) + sum_wide<kind>(x + i, n - i);
}

template <Norm kind>
[[gnu::always_inline]] inline double sum_half(const c10::Half* x, int64_t n) {
  int64_t done;
  const double first = sum_first<kind == Norm::kSquares>(x, n, done);
  return first + sum_wide<kind>(x + done, n - done);
}

template <Norm kind, class scalar_t>
[[gnu::always_inline]] inline double sum(const scalar_t* x, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>)
    return sum_bfloat16<kind>(x, n);
  else if constexpr (std::is_same_v<scalar_t, c10::Half>)
    return sum_half<kind>(x, n);
  else
    return sum_wide<kind>(x, n);
}

// Without their sign bits, the bits of floats compare as integers, with NaN above infinity. So for
// every dtype the largest integer is the norm of order infinity, or NaN if any element is NaN.
template <class scalar_t>
[[gnu::always_inline]] inline double maximum(const scalar_t* x, int64_t n) {
  using bits_t = std::conditional_t<sizeof(scalar_t) == 8, int64_t,
                                    std::conditional_t<sizeof(scalar_t) == 4, int32_t, int16_t>>;
  constexpr bits_t kMagnitude = std::numeric_limits<bits_t>::max();
  constexpr int64_t kWide = 256 / sizeof(scalar_t);
  const auto* bits = reinterpret_cast<const bits_t*>(x);
  bits_t most[kWide] = {};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide)
    for (int64_t j = 0; j < kWide; ++j)
      most[j] = std::max<bits_t>(most[j], bits[i + j] & kMagnitude);
  for (; i < n; ++i) most[0] = std::max<bits_t>(most[0], bits[i] & kMagnitude);
  // By halves: a chain over the lanes would take longer than reading a small tensor.
  for (int64_t half = kWide / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) most[j] = std::max(most[j], most[j + half]);
  return widen(std::bit_cast<scalar_t>(most[0]));
}

template <class scalar_t>
[[gnu::always_inline]] inline double measure_as(const void* data, int64_t n, Norm kind) {
  const auto* x = static_cast<const scalar_t*>(data);
  switch (kind) {
    case Norm::kSum:
      return sum<Norm::kSum>(x, n);
    case Norm::kSquares:
      return sum<Norm::kSquares>(x, n);
    case Norm::kMax:
      return maximum(x, n);
  }
  return 0;
}

template <class scalar_t, class acc_t>
[[gnu::always_inline]] inline void scale_as(void* data, int64_t n, acc_t coef) {
  auto* x = static_cast<scalar_t*>(data);
  if (means_zeros(coef)) {
    std::memset(data, 0, n * sizeof(scalar_t));
  } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    multiply(x, coef, n);
  } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    for (int64_t i = 0; i < n; ++i) x[i] = round_to_bfloat16(widen(x[i]) * coef);
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] *= coef;
  }
}

template <class scalar_t>
[[gnu::always_inline]] inline void clamp_as(void* data, int64_t n, double bound) {
  auto* x = static_cast<scalar_t*>(data);
  const auto high = static_cast<scalar_t>(bound);
  const auto limit = widen(high);
  // With a NaN the maximum is NaN and the comparison false: such a tile is always written.
  if (maximum(x, n) <= limit) return;
  for (int64_t i = 0; i < n; ++i) {
    const auto value = widen(x[i]);
    x[i] = value > limit ? high : value < -limit ? -high : x[i];
  }
}

// Calls `visit` with a zero of the element type. A new dtype needs a case here.
template <class Visit>
[[gnu::always_inline]] inline auto with_scalar(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kFloat:
      return visit(float());
    case Dtype::kBFloat16:
      return visit(c10::BFloat16());
    case Dtype::kHalf:
      return visit(c10::Half());
    default:
      return visit(double());
  }
}

}  // namespace

#if defined(__x86_64__) && defined(__gnu_linux__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#endif
double measure(const void* data, Dtype dtype, int64_t n, Norm kind) {
  return with_scalar(dtype, [=](auto zero) __attribute__((always_inline)) {
    return measure_as<decltype(zero)>(data, n, kind);
  });
}

#if defined(__x86_64__) && defined(__gnu_linux__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#endif
void scale(void* data, Dtype dtype, int64_t n, double coef) {
  with_scalar(dtype, [=](auto zero) __attribute__((always_inline)) {
    using acc_t = std::conditional_t<std::is_same_v<decltype(zero), double>, double, float>;
    scale_as<decltype(zero)>(data, n, static_cast<acc_t>(coef));
  });
}

#if defined(__x86_64__) && defined(__gnu_linux__)
[[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#endif
void clamp(void* data, Dtype dtype, int64_t n, double bound) {
  with_scalar(dtype, [=](auto zero) __attribute__((always_inline)) {
    clamp_as<decltype(zero)>(data, n, bound);
  });
}

}  // namespace fastclip::cpu
