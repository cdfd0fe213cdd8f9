// The scale phase, and the clamp: tensors in place, and no write that changes nothing.
#pragma once

#include "tile.cuh"

namespace fastclip::cuda {

// A change says which number leaves all as it is, and of an element whether it was changed.
// A coefficient may stand for zeros, see Note [coef].
struct Multiply {
  __device__ static bool is_idle(double coef) { return coef == 1; }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t coef) {
    x = means_zeros(coef) ? 0 : x * coef;
    return true;
  }
};

// NaN stays. The bound is rounded to the dtype together with the elements that take it.
struct Clamp {
  __device__ static bool is_idle(double bound) { return std::isinf(bound); }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t bound) {
    if (!(fabs(x) > bound)) return false;
    x = copysign(bound, x);
    return true;
  }
};

// Applies a change with number(group) to every tile. Spans go from last to first: what the norm
// phase read last is still in the L2 cache. By all blocks of a grid.
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
