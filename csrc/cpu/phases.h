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
  Accumulator(Norm kind, double p) : kind_(kind), p_(p) {}

  void add(double partial) {
    if (kind_ == Norm::kPower) {
      add_norm(partial);
    } else if (kind_ == Norm::kMax) {
      if (partial > total_ || std::isnan(partial)) total_ = partial;
    } else {
      total_ += partial;
    }
  }

  // What `add` takes: a power sum, a maximum, or for kPower a norm.
  double partial() const {
    return kind_ == Norm::kPower ? most_ * std::pow(total_, 1 / p_) : total_;
  }

  double norm() const { return kind_ == Norm::kSquares ? std::sqrt(total_) : partial(); }

 private:
  // Powers are taken relative to the largest norm so far, so that none overflows.
  void add_norm(double norm) {
    if (norm == most_) {
      total_ += 1;
    } else if (norm < most_) {
      total_ += std::pow(norm / most_, p_);
    } else {
      total_ = total_ * std::pow(most_ / norm, p_) + 1;
      most_ = norm;
    }
  }

  Norm kind_;
  double p_, total_ = 0, most_ = 0;
};

// One partial result for each span.
inline std::vector<double> norm_phase(const FlatList& tensors, const Spans& spans, Norm kind,
                                      double p) {
  std::vector<double> partials(spans.size());
  spans.parallel([&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      Accumulator span(kind, p);
      spans.for_each_tile(k, [&](size_t i, void* data, int64_t n) {
        span.add(measure(data, tensors[i].dtype, n, kind, p));
      });
      partials[k] = span.partial();
    }
  });
  return partials;
}

// Calls measure(kind), which gives norms, and where squares of float64 elements may have overflowed
// measures again as other orders are, relative to the largest.
template <class Measure>
std::vector<double> without_overflow(const FlatList& tensors, double p, Measure&& measure) {
  std::vector<double> norms = measure(norm_kind(p));
  const auto is_inf = [](double norm) { return std::isinf(norm); };
  if (norm_kind(p) != Norm::kSquares || tensors.result_dtype() != at::kDouble ||
      std::ranges::none_of(norms, is_inf))
    return norms;
  const std::vector<double> others = measure(Norm::kPower);
  for (size_t i = 0; i < norms.size(); ++i)
    if (is_inf(norms[i])) norms[i] = others[i];
  return norms;
}

// The norm of all tensors, from one group of spans.
inline double total_norm(const FlatList& tensors, const Spans& spans, double p) {
  return without_overflow(tensors, p, [&](Norm kind) -> std::vector<double> {
    Accumulator total(kind, p);
    for (const double partial : norm_phase(tensors, spans, kind, p)) total.add(partial);
    return {total.norm()};
  })[0];
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
