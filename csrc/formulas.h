// Shared by the CPU and the CUDA kernels: the dtypes, the kinds of norms, and the formula of the
// clipping coefficient. Includes no torch header and compiles as device code too.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastclip {

// The dtypes that the kernels take, in the order of their switches. A new dtype needs a case in
// `element_size` below, in `kernel_dtype` in tensor_list.h, in the switches and integer types of
// cpu/tile.cpp and cuda/tile.cuh, and in `add_sum` in cuda/norm.cuh, and a place in the lists REAL
// of fastclip/_gradients/local.py and DTYPES of fastclip/_check_cases.py and tests/conftest.py.
// `Entry` of cuda/partition.h has two bits for a dtype, all in use, and counts bytes in pairs.
enum class Dtype { kFloat, kBFloat16, kHalf, kDouble, kCount };

// A tensor as the kernels see it: contiguous memory, its length and its dtype.
struct Flat {
  char* data;
  int64_t numel;
  Dtype dtype;

  int64_t element_size() const {
    return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
  }
};

// The norms that have kernels: of order 1, 2 and infinity. The plain-PyTorch default of an op
// handles all other orders.
enum class Norm { kSum, kSquares, kMax };

inline bool has_kernel(double p) { return p == 1 || p == 2 || (std::isinf(p) && p > 0); }

inline Norm norm_kind(double p) {
  return p == 1 ? Norm::kSum : p == 2 ? Norm::kSquares : Norm::kMax;
}

// Note [coef]: the multiplier is min(1, max_norm / (total_norm + 1e-6)), or 1 if the threshold is
// infinite, whatever the norm. A NaN or negative threshold, which only a tensor can hold (numbers
// are checked), gives NaN: a negative multiplier would silently turn descent into ascent. Code that
// scales writes nothing if the multiplier is 1, and fills with zeros if it is -0.0, because a NaN
// times 0 stays NaN; this formula never gives -0.0. fastclip/_ops/coef.py has it in Python.
template <class acc_t>
constexpr acc_t clip_coef(acc_t total_norm, acc_t max_norm) {
  if (max_norm == std::numeric_limits<acc_t>::infinity()) return 1;
  if (!(max_norm >= 0)) return std::numeric_limits<acc_t>::quiet_NaN();
  const acc_t coef = max_norm / (total_norm + static_cast<acc_t>(1e-6));
  return coef >= 1 ? 1 : coef + 0;
}

// `clip_coef` in the precision of the result, but in float64 if the norm overflows float32.
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
