// The norm phase and the finish: from elements to one float64 per span, and from those to a norm.
//
// Note [accuracy]: terms of float32 are added in pairs, those of 16-bit floats, whose squares
// float32 holds exactly, in trees of eight; all above is float64. So at most three roundings of
// 2^-24 lie on any element's way to the sum, and half of them in the norm.
#pragma once

#include "../formulas.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace fastclip::cuda {

// |a| + |b| or a^2 + b^2; what is fused is said here and not left to the compiler.
template <Norm kind, class acc_t>
__device__ acc_t sum_pair(acc_t a, acc_t b) {
  if constexpr (kind == Norm::kSquares) return fma(b, b, a * a);
  return fabs(a) + fabs(b);
}

// In pairs or trees of `acc_t`, see Note [accuracy]. Where float32 squares leave the range of
// normal numbers, or a sum of magnitudes float32's, the elements are added again in float64.
template <Norm kind, Dtype dtype, class acc_t = acc_type<dtype>>
__device__ double sum_vector(const Vector& vector) {
  constexpr int kPairs = kElements<dtype> / 2;
  Values<dtype> x;
  decode<dtype>(vector, x);
  acc_t pairs[kPairs], sum = 0;
  for (int k = 0; k < kPairs; ++k) pairs[k] = sum_pair<kind, acc_t>(x[2 * k], x[2 * k + 1]);
  if constexpr (kPairs == 4)
    sum = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
  else
    for (const acc_t pair : pairs) sum += pair;
  if constexpr (std::is_same_v<acc_t, float> && dtype != Dtype::kHalf) {
    // Below, what eight subnormal squares lose could be 2^-24 of the sum.
    constexpr float kTiny = kind == Norm::kSquares ? 0x1p-120f : -1;
    const bool zero = (vector[0] | vector[1] | vector[2] | vector[3]) == 0;
    if (!(sum > kTiny && sum <= std::numeric_limits<float>::max()) && !zero)
      return sum_vector<kind, dtype, double>(vector);
    if constexpr (kPairs == 2) return static_cast<double>(pairs[0]) + pairs[1];
  }
  return sum;
}

// In one place: inlined for every element it would be most of the code.
__device__ __attribute__((noinline)) double power(double x, double p) { return pow(x, p); }

// What one thread has measured so far.
template <Norm kind>
class Accumulator {
 public:
  __device__ explicit Accumulator(double p) : p_(p) {}

  __device__ void add(const Tile& tile) {
    for_vectors(tile, [&]<Dtype dtype>(const auto& vectors, int) {
#pragma unroll
      for (const Vector& vector : vectors) {
        if constexpr (kind == Norm::kSum || kind == Norm::kSquares)
          add(sum_vector<kind, dtype>(vector));
        else
          add_elements<dtype>(vector);
      }
    });
  }

  // A partial result: a power sum, a maximum, or for kPower a norm.
  __device__ void add(double partial) {
    if constexpr (kind == Norm::kPower)
      add_norm(partial);
    else
      total_ = Op::combine(total_, partial);
  }

  // The partial result of all threads of the block, valid in all of them.
  __device__ double reduce() const {
    if constexpr (kind != Norm::kPower) return reduce_block<Op>(total_);
    const double norm = most_ * power(total_, 1 / p_);
    const double most = reduce_block<Max>(norm);
    if (most == 0 || !isfinite(most)) return most;
    return most * power(reduce_block<Sum>(power(norm / most, p_)), 1 / p_);
  }

 private:
  using Op = std::conditional_t<kind == Norm::kMax, Max, Sum>;

  template <Dtype dtype>
  __device__ void add_elements(const Vector& vector) {
    Values<dtype> x;
    decode<dtype>(vector, x);
    acc_type<dtype> most = 0;
    for (const auto value : x) {
      if constexpr (kind == Norm::kPower)
        add_norm(fabs(static_cast<double>(value)));
      else
        most = Max::combine(most, fabs(value));
    }
    if constexpr (kind == Norm::kMax) add(most);
  }

  // Powers are taken relative to the largest norm so far, so that none overflows.
  __device__ void add_norm(double norm) {
    if (norm == 0) return;
    const bool above = !(norm <= most_);
    const double share = above ? most_ / norm : norm / most_;
    const double term = norm == most_ ? 1 : power(share, p_);
    total_ = above ? total_ * term + 1 : total_ + term;
    if (above) most_ = norm;
  }

  double p_, total_ = 0, most_ = 0;
};

// Writes partials[span] for every span of the table. By all blocks of a grid.
template <Norm kind, class Table>
__device__ void norm_phase(const Table& table, double p, double* partials) {
  for (int span = blockIdx.x; span < table.spans; span += gridDim.x) {
    Accumulator<kind> accumulator(p);
    for_each_tile<false>(table, span, [&](const Tile& tile) { accumulator.add(tile); });
    const double partial = accumulator.reduce();
    if (threadIdx.x == 0) partials[table.first_span + span] = partial;
  }
}

// The norm of `count` spans. By all threads of a block; the result is valid in all of them.
template <Norm kind>
__device__ double finish(const double* partials, int count, double p) {
  Accumulator<kind> accumulator(p);
  for (int i = threadIdx.x; i < count; i += kThreads) accumulator.add(__ldcg(partials + i));
  const double partial = accumulator.reduce();
  return kind == Norm::kSquares ? sqrt(partial) : partial;
}

}  // namespace fastclip::cuda
