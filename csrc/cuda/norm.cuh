// The norm phase and the finish: from elements to one float64 per span, and from those to a norm.
//
// Note [accuracy]: what a thread takes of a tile it adds in float32, in one tree: the elements of a
// vector, then the vectors. Above is float64. So at most five roundings of 2^-24 lie on an
// element's way to the sum, that of its square included, and half of them in a norm of order 2.
#pragma once

#include "../formulas.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace fastclip::cuda {

// What a thread takes of a tile, of |x| or x^2, with fma only where it says so. `bits` stays 0 if
// all elements are +0.
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

// In one place: inlined wherever it is called it would be most of the code.
__device__ __attribute__((noinline)) double power(double x, double p) { return pow(x, p); }

// A sum of powers of x / largest, so that none overflows.
struct Powers {
  double sum = 0, one_by_largest = 0x1p1022;
};

// Adds |x|^p of some elements, products if p is whole.
template <class T, size_t kCount>
__device__ __attribute__((noinline)) Powers add_powers(Powers powers, const std::array<T, kCount> x,
                                                       double p) {
  T most = 0;
  for (const T value : x) most = Max::combine(most, fabs(value));
  if (!(most * powers.one_by_largest <= 1 + 0x1p-52)) {  // two roundings beyond 1 are 1
    const double one_by_most = 1 / min(max(static_cast<double>(most), 0x1p-1022), 0x1p1022);
    powers = {powers.sum * power(one_by_most / powers.one_by_largest, p), one_by_most};
  }
  const bool whole = p <= 64 && p == floor(p);
  double bases[kCount], terms[kCount];
  for (size_t k = 0; k < kCount; ++k) {
    bases[k] = fabs(static_cast<double>(x[k])) * powers.one_by_largest;
    terms[k] = whole ? 1 : power(bases[k], p);
  }
  for (int left = whole ? static_cast<int>(p) : 0; left > 0; left /= 2) {
    for (size_t k = 0; k < kCount; ++k) {
      if (left % 2) terms[k] *= bases[k];
      bases[k] *= bases[k];
    }
  }
  for (const double term : terms) powers.sum += term;
  return powers;
}

// What one thread has measured so far.
template <Norm kind>
class Accumulator {
 public:
  __device__ explicit Accumulator(double p) : p_(p) {}

  __device__ void add(const Tile& tile) {
    with_vectors(tile, [&]<Dtype dtype, class Vectors>(const Vectors& vectors) {
      if constexpr (kind == Norm::kSum || kind == Norm::kSquares)
        add_sum<dtype>(vectors);
      else
        add_elements<dtype>(vectors);
    });
  }

  // A partial result: a power sum, a maximum, or for kPower a norm.
  __device__ void add(double partial) {
    if constexpr (kind == Norm::kPower)
      powers_ = add_powers(powers_, std::array{partial}, p_);
    else
      total_ = Op::combine(total_, partial);
  }

  // The partial result of all threads of the block, valid in all of them.
  __device__ double reduce() const {
    if constexpr (kind != Norm::kPower) return reduce_block<Op>(total_);
    const double norm = power(powers_.sum, 1 / p_) / powers_.one_by_largest;
    const double most = reduce_block<Max>(norm);
    if (most == 0 || !isfinite(most)) return most;
    return most * power(reduce_block<Sum>(power(norm / most, p_)), 1 / p_);
  }

 private:
  using Op = std::conditional_t<kind == Norm::kMax, Max, Sum>;

  // Where float32 squares leave the range of normal numbers, or a sum of magnitudes float32's, the
  // elements are read and added again in float64.
  template <Dtype dtype, class Vectors>
  __device__ void add_sum(const Vectors& vectors) {
    using acc_t = acc_type<dtype>;
    uint32_t bits = 0;
    const acc_t sum = sum_tile<kind, dtype, acc_t>(vectors, bits);
    if constexpr (std::is_same_v<acc_t, float> && dtype != Dtype::kHalf) {
      // Below, what 32 subnormal squares lose could be 2^-24 of the sum.
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
  __device__ void add_elements(const Vectors& vectors) {
#pragma unroll(Vectors::kUnroll)
    for (int j = 0; j < kVectors; ++j) {
      Values<dtype> x;
      decode<dtype>(vectors.load(j), x);
      if constexpr (kind == Norm::kPower) {
        powers_ = add_powers(powers_, x, p_);
      } else {
        acc_type<dtype> most = 0;
        for (const auto value : x) most = Max::combine(most, fabs(value));
        add(most);
      }
    }
  }

  double p_, total_ = 0;
  Powers powers_;
};

template <Norm kind>
__device__ double norm_of(double partial) {
  return kind == Norm::kSquares ? sqrt(partial) : partial;
}

// Calls result(span, partial), in one thread, for every span of the table. By all blocks of a grid.
template <Norm kind, class Table, class Result>
__device__ void norm_phase(const Table& table, double p, Result&& result) {
  for (int span = blockIdx.x; span < table.spans; span += gridDim.x) {
    Accumulator<kind> accumulator(p);
    for_each_tile<false>(table, span, [&](const Tile& tile) { accumulator.add(tile); });
    const double partial = accumulator.reduce();
    if (threadIdx.x == 0) result(table.first_span + span, partial);
  }
}

// The norm of `count` spans. By all threads of a block; the result is valid in all of them.
template <Norm kind>
__device__ double finish(const double* partials, int count, double p) {
  if (kind == Norm::kPower && count == 1) return __ldcg(partials);  // a power and a root round
  Accumulator<kind> accumulator(p);
  for (int i = threadIdx.x; i < count; i += kThreads) accumulator.add(__ldcg(partials + i));
  return norm_of<kind>(accumulator.reduce());
}

}  // namespace fastclip::cuda
