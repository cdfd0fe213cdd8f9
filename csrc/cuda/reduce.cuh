// Reduces a value of each thread to one for the block, in a fixed tree: first inside each warp,
// then across warps.
#pragma once

#include "partition.h"

namespace fastclip::cuda {

struct Sum {
  __device__ static double combine(double a, double b) { return a + b; }
};

struct Max {  // NaN if any value is NaN
  template <class T>
  __device__ static T combine(T a, T b) {
    return a > b || a != a ? a : b;
  }
};

template <class Op, int kLanes>
__device__ double reduce_lanes(double value) {
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
    value = Op::combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// All threads of a block must call this; all get the result.
template <class Op>
__device__ double reduce_block(double value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double warps[kWarps];
  value = reduce_lanes<Op, 32>(value);
  __syncthreads();  // an earlier call may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return reduce_lanes<Op, kWarps>(warps[threadIdx.x % kWarps]);
}

}  // namespace fastclip::cuda
