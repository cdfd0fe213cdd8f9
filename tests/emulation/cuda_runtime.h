// As much of CUDA as the kernels use, for g++: the unmodified .cu and .cuh files compile against
// this header and run on the CPU. Vector types, fp16 and bf16 are the toolkit's own.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "machine.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static thread_local
#define CUDART_VERSION 13000

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define gridDim (::emulation::grid_size())

using std::exp2;
using std::fabs;
using std::floor;
using std::fma;
using std::isfinite;
using std::max;
using std::min;
using std::pow;
using std::sqrt;

inline void __syncthreads() { emulation::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xffffffffu) emulation::fail("a shuffle of part of a warp");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulation::exchange(bits, lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t) {
  *blocks = emulation::machine().threads_per_multiprocessor / threads;
  return cudaSuccess;
}

template <class Table, class Args>
cudaError_t launch(void (*kernel)(Table, Args), dim3 grid, dim3 block, void** args, bool together) {
  return static_cast<cudaError_t>(emulation::run(grid.x, block.x, together, [=] {
    kernel(*static_cast<Table*>(args[0]), *static_cast<Args*>(args[1]));
  }));
}

template <class T>
cudaError_t cudaLaunchKernel(T* kernel, dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  return launch(kernel, grid, block, args, false);
}

template <class T>
cudaError_t cudaLaunchCooperativeKernel(T* kernel, dim3 grid, dim3 block, void** args, size_t,
                                        cudaStream_t) {
  return launch(kernel, grid, block, args, true);
}
