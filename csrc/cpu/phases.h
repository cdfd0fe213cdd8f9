// The two phases of a clip, measuring and scaling, for the ops that do one of them or both.
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "spans.h"
#include "tile.h"

namespace fastclip::cpu {

// Combines the partial results of tiles into that of a span (Note [partition] in spans.h), and
// those of spans into a group's.
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

// The norm of all tensors together.
inline double total_norm(const FlatList& tensors, const Spans& spans, Norm kind) {
  Accumulator total(kind);
  for (const double partial : norm_phase(tensors, spans, kind)) total.add(partial);
  return total.norm();
}

// Whether squares of float64 elements may have overflowed. The default op then measures again and
// divides by the largest magnitude first.
inline bool may_have_overflowed(const FlatList& tensors, Norm kind, double norm) {
  return kind == Norm::kSquares && tensors.result_dtype() == at::kDouble && std::isinf(norm);
}

// Multiplies tensor i by coef(i) in place, unless coef(i) is 1. Spans are taken from last to first,
// since the data that the norm phase has read last is still in the cache.
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
