// The two halves of a clip, shared by the ops that measure, scale or do both.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "spans.h"
#include "tile.h"

namespace fastclip::cpu {

// Puts partial results together: of tiles to a span's, of spans to a group's.
class Accumulator {
 public:
  explicit Accumulator(Norm kind) : kind_(kind) {}

  void add(double partial) {
    if (kind_ != Norm::kMax) {
      total_ += partial;
    } else if (partial > total_ || std::isnan(partial)) {
      total_ = partial;
    }
  }

  double partial() const { return total_; }
  double norm() const { return kind_ == Norm::kSquares ? std::sqrt(total_) : total_; }

 private:
  Norm kind_;
  double total_ = 0;
};

// One partial result for each span.
inline std::vector<double> norm_phase(const FlatList& tensors, const Spans& spans, Norm kind) {
  std::vector<double> partials(spans.size());
  spans.parallel([&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      Accumulator span(kind);
      spans.for_each_tile(k, [&](size_t i, void* data, int64_t n) {
        span.add(measure(data, tensors[i].dtype, n, kind));
      });
      partials[k] = span.partial();
    }
  });
  return partials;
}

// The norm of all tensors, from one group of spans.
inline double total_norm(const FlatList& tensors, const Spans& spans, Norm kind) {
  Accumulator total(kind);
  for (const double partial : norm_phase(tensors, spans, kind)) total.add(partial);
  return total.norm();
}

// Whether squares of float64 elements may have overflowed; the default op then measures again,
// relative to the largest.
inline bool may_have_overflowed(const FlatList& tensors, Norm kind, double norm) {
  return kind == Norm::kSquares && tensors.result_dtype() == at::kDouble && std::isinf(norm);
}

// Multiplies tensor i by coef(i) in place unless that is 1. Spans go from last to first:
// what the norm phase read last is still in the cache.
template <class Coef>
void scale_phase(const FlatList& tensors, const Spans& spans, Coef&& coef) {
  spans.parallel([&](int64_t first, int64_t last) {
    for (int64_t k = last - 1; k >= first; --k) {
      spans.for_each_tile(k, [&](size_t i, void* data, int64_t n) {
        const double c = coef(i);
        if (c != 1) scale(data, tensors[i].dtype, n, c);
      });
    }
  });
}

// A 0-d tensor on the CPU.
inline at::Tensor scalar_result(double value, at::ScalarType dtype) {
  at::Tensor result = at::empty({}, at::TensorOptions().dtype(dtype));
  if (dtype == at::kDouble) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return result;
}

}  // namespace fastclip::cpu
