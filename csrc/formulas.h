// What both devices speak of and compute: dtypes, norms, the decision. Free of torch, and for
// device code too.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastclip {

// The dtypes of the kernels, in the order of their switches. A new one is a case of `element_size`
// below, of `kernel_dtype` in tensor_list.h, of the switches and integers of cpu/tile.cpp and
// cuda/tile.cuh, and of `add_sum` in cuda/norm.cuh; REAL of fastclip/_gradients/local.py and
// DTYPES of fastclip/_check_cases.py and tests/conftest.py list it. An `Entry` of cuda/partition.h
// has two bits for it, which four dtypes fill, and counts in units of two bytes.
enum class Dtype { kFloat, kBFloat16, kHalf, kDouble, kCount };

// A tensor as flat memory: all that is left of it for a kernel.
struct Flat {
  char* data;
  int64_t numel;
  Dtype dtype;

  int64_t element_size() const {
    return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
  }
};

// The norms that have kernels: of order 1, 2 and infinity. The default op measures those of any
// other order.
enum class Norm { kSum, kSquares, kMax };

inline bool has_kernel(double p) { return p == 1 || p == 2 || (std::isinf(p) && p > 0); }

inline Norm norm_kind(double p) {
  return p == 1 ? Norm::kSum : p == 2 ? Norm::kSquares : Norm::kMax;
}

// Note [coef]: the multiplier is min(1, max_norm / (total_norm + 1e-6)). An infinite threshold
// only measures. A NaN or negative threshold, which only a tensor can bring here, gives NaN: loud,
// where a negative multiplier would silently turn descent into ascent. Whoever scales writes
// nothing at 1, and takes -0.0, which this never gives, to mean zeros, which no multiplication
// makes of a NaN. Python has the same formula in fastclip/_ops/coef.py.
template <class acc_t>
constexpr acc_t clip_coef(acc_t total_norm, acc_t max_norm) {
  if (max_norm == std::numeric_limits<acc_t>::infinity()) return 1;
  if (!(max_norm >= 0)) return std::numeric_limits<acc_t>::quiet_NaN();
  const acc_t coef = max_norm / (total_norm + static_cast<acc_t>(1e-6));
  return coef >= 1 ? 1 : coef + 0;
}

// The decision in the precision of the result, but in float64 where float32 does not hold the norm.
constexpr double clip_coef_as(bool wide, double total_norm, double max_norm) {
  const bool fits = static_cast<float>(total_norm) <= std::numeric_limits<float>::max();
  return wide || !fits ? clip_coef(total_norm, max_norm)
                       : clip_coef(static_cast<float>(total_norm), static_cast<float>(max_norm));
}

template <class acc_t>
constexpr bool means_zeros(acc_t coef) {
  return coef == 0 && 1 / coef < 0;
}

}  // namespace fastclip
