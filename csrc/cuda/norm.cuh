// The norm phase reduces the elements of each span (see partition.h) to one float64; `finish`
// reduces these to a norm.
//
// Note [accuracy]: a thread adds its elements of a tile in float32, as one tree: first within each
// vector, then across vectors. All further additions are in float64. So each element goes through
// at most five roundings of relative size 2^-24, including that of its square. In a norm of order
// 2, the final square root halves their effect.
#pragma once

#include "../formulas.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace fastclip::cuda {

// The sum of |x| or x^2 over a thread's elements of a tile. With --fmad=false the compiler fuses
// nothing itself; only the explicit calls of fma are fused. `bits` stays 0 if all elements are +0.
template <Norm kind, Dtype dtype, class acc_t, class Vectors>
__device__ acc_t sum_tile(const Vectors& vectors, uint32_t& bits) {
  static_assert(kVectors == 4);
  acc_t sum = 0, two = 0;
#pragma unroll(Vectors::kUnroll)
  for (int j = 0; j < kVectors; ++j) {
    const Vector vector = vectors.load(j);
    for (const uint32_t word : vector) bits |= word;
    Values<dtype> x;
    decode<dtype>(vector, x);
    constexpr int kPairs = kElements<dtype> / 2;
    acc_t sums[kPairs];
    for (int k = 0; k < kPairs; ++k) {
      const acc_t a = x[2 * k], b = x[2 * k + 1];
      sums[k] = kind == Norm::kSquares ? fma(b, b, a * a) : fabs(a) + fabs(b);
    }
    for (int half = kPairs / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    two = j % 2 == 0 ? sums[0] : two + sums[0];
    if (j % 2 == 1) sum = j == 1 ? two : sum + two;
  }
  return sum;
}

// The partial result of one thread.
template <Norm kind>
class Accumulator {
 public:
  __device__ void add(const Tile& tile) {
    with_vectors(tile, [&]<Dtype dtype, class Vectors>(const Vectors& vectors) {
      if constexpr (kind == Norm::kMax)
        add_largest<dtype>(vectors);
      else
        add_sum<dtype>(vectors);
    });
  }

  // Adds another partial result, which is a sum or a maximum.
  __device__ void add(double partial) { total_ = Op::combine(total_, partial); }

  // The partial result of all threads of the block, valid in all of them.
  __device__ double reduce() const { return reduce_block<Op>(total_); }

 private:
  using Op = std::conditional_t<kind == Norm::kMax, Max, Sum>;

  // If squares leave the range of normal float32 numbers, or a sum of magnitudes overflows float32,
  // the elements are read again and added in float64.
  template <Dtype dtype, class Vectors>
  __device__ void add_sum(const Vectors& vectors) {
    using acc_t = acc_type<dtype>;
    uint32_t bits = 0;
    const acc_t sum = sum_tile<kind, dtype, acc_t>(vectors, bits);
    if constexpr (std::is_same_v<acc_t, float> && dtype != Dtype::kHalf) {
      // Below kTiny, the rounding errors of 32 subnormal squares could reach 2^-24 of the sum.
      constexpr float kTiny = kind == Norm::kSquares ? 0x1p-118f : -1;
      const bool in_range = sum > kTiny && sum <= std::numeric_limits<float>::max();
      if (!in_range && bits != 0) {
        total_ += sum_tile<kind, dtype, double>(OneByOne{vectors.tile}, bits);
        return;
      }
    }
    total_ += sum;
  }

  template <Dtype dtype, class Vectors>
  __device__ void add_largest(const Vectors& vectors) {
#pragma unroll(Vectors::kUnroll)
    for (int j = 0; j < kVectors; ++j) {
      Values<dtype> x;
      decode<dtype>(vectors.load(j), x);
      acc_type<dtype> most = 0;
      for (const auto value : x) most = Max::combine(most, fabs(value));
      add(most);
    }
  }

  double total_ = 0;
};

template <Norm kind>
__device__ double norm_of(double partial) {
  return kind == Norm::kSquares ? sqrt(partial) : partial;
}

// Calls result(span, partial), in one thread, for each span of the table. All blocks call this.
template <Norm kind, class Table, class Result>
__device__ void norm_phase(const Table& table, Result&& result) {
  for (int span = blockIdx.x; span < table.spans; span += gridDim.x) {
    Accumulator<kind> accumulator;
    for_each_tile<false>(table, span, [&](const Tile& tile) { accumulator.add(tile); });
    const double partial = accumulator.reduce();
    if (threadIdx.x == 0) result(table.first_span + span, partial);
  }
}

// The norm of `count` spans. All threads of a block must call this; all get the result.
template <Norm kind>
__device__ double finish(const double* partials, int count) {
  Accumulator<kind> accumulator;
  for (int i = threadIdx.x; i < count; i += kThreads) accumulator.add(__ldcg(partials + i));
  return norm_of<kind>(accumulator.reduce());
}

}  // namespace fastclip::cuda
