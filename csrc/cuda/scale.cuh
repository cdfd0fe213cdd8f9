// The scale phase, and the clamp: tensors in place, and no write that changes nothing.
#pragma once

#include "tile.cuh"

namespace fastclip::cuda {

// A change says which number leaves all as it is, and of an element whether it was changed.
// A coefficient below 0 stands for zeros, see Note [coef].
struct Multiply {
  static constexpr int kResident = 2;  // blocks to a multiprocessor
  __device__ static bool is_idle(double coef) { return coef == 1; }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t coef) {
    x = coef < 0 ? 0 : x * coef;
    return true;
  }
};

// NaN stays. The bound is rounded to the dtype together with the elements that take it.
struct Clamp {
  static constexpr int kResident = 1;
  __device__ static bool is_idle(double bound) { return std::isinf(bound); }

  template <class acc_t>
  __device__ static bool apply(acc_t& x, acc_t bound) {
    const bool outside = fabs(x) > bound;
    x = outside ? copysign(bound, x) : x;
    return outside;
  }
};

// Applies a change with number(slot) to every tile. Spans go from last to first: what the norm
// phase read last is still in the L2 cache. By all blocks of a grid.
template <class Change, class Table, class Number>
__device__ void change_phase(const Table& table, Number&& number) {
  for (int span = table.spans - 1 - static_cast<int>(blockIdx.x); span >= 0; span -= gridDim.x) {
    for_each_tile<true>(table, span, [&](const Tile& tile) {
      const double value = number(tile.slot);
      if (Change::is_idle(value)) return;
      for_vectors(tile, [&]<Dtype dtype>(const auto& vectors, int first) {
        constexpr int kCount = sizeof(vectors) / kVector;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          Values<dtype> x;
          decode<dtype>(vectors[j], x);
          bool changed = false;
          for (auto& element : x)
            changed |= Change::apply(element, static_cast<acc_type<dtype>>(value));
          if (!changed) continue;
          Vector result = encode<dtype>(x);
          if constexpr (kCount == kVectors)
            *tile.at(j) = std::bit_cast<uint4>(result);
          else
            copy_vector<true>(tile, first + j, result);
        }
      });
    });
  }
}

}  // namespace fastclip::cuda
