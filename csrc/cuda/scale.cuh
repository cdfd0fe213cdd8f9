// The scale phase and the clamp. Both work in place, and do not write vectors that need no change.
#pragma once

#include "tile.cuh"

namespace fastclip::cuda {

// A change has `is_idle`, which says whether a number leaves all elements as they are, and `apply`,
// which changes an element and returns whether it did. For a coefficient of -0.0 see Note [coef].
struct Multiply {
  __device__ static bool is_idle(double coef) { return coef == 1; }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t coef) {
    x = means_zeros(coef) ? 0 : x * coef;
    return true;
  }
};

// NaN stays NaN. An element that becomes the bound is rounded to its dtype when it is stored.
struct Clamp {
  __device__ static bool is_idle(double bound) { return std::isinf(bound); }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t bound) {
    if (!(fabs(x) > bound)) return false;
    x = copysign(bound, x);
    return true;
  }
};

// Changes each tile by number(its group). Spans (runs of tiles) go last to first: what the norm
// phase has read last is still in the L2 cache. All blocks of the grid must call this.
template <class Change, class Table, class Number>
__device__ void change_phase(const Table& table, Number&& number) {
  for (int span = table.spans - 1 - static_cast<int>(blockIdx.x); span >= 0; span -= gridDim.x) {
    for_each_tile<true>(table, span, [&](const Tile& tile) {
      const double value = number(tile.group);
      if (Change::is_idle(value)) return;
      with_vectors(tile, [&]<Dtype dtype, class Vectors>(const Vectors& vectors) {
#pragma unroll(Vectors::kUnroll)
        for (int j = 0; j < kVectors; ++j) {
          Values<dtype> x;
          decode<dtype>(vectors.load(j), x);
          bool changed = false;
          for (auto& element : x)
            changed |= Change::apply(element, static_cast<acc_type<dtype>>(value));
          if (changed) vectors.store(j, encode<dtype>(x));
        }
      });
    });
  }
}

}  // namespace fastclip::cuda
