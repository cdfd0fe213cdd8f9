// Runs work on torch's own threads, whatever the compiler. at::parallel_for is a template with
// OpenMP pragmas. clang would compile them to calls of LLVM's OpenMP, a second runtime that would
// compete with torch's for the cores. So the function that g++ would call is called here by name.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#if defined(__linux__) && AT_PARALLEL_OPENMP
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace fastclip::cpu {

// Divides [0, size) among torch's threads, at most ceil(size / grain) of them, and calls
// work(first, last) on each thread for its range. `work` must not throw.
template <class Work>
void parallel(int64_t size, int64_t grain, const Work& work) {
#if defined(__linux__) && AT_PARALLEL_OPENMP
  if (size <= grain || at::in_parallel_region() || at::get_num_threads() == 1) return work(0, size);
  auto share = [&] {
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(size, grain));
    const int64_t length = at::divup(size, threads), first = omp_get_thread_num() * length;
    if (first < size) work(first, std::min(size, first + length));
  };
  // 0: all threads. If this number changed from call to call, the runtime would start new threads.
  GOMP_parallel([](void* data) { (*static_cast<decltype(share)*>(data))(); }, &share, 0, 0);
#else
  at::parallel_for(0, size, grain, work);
#endif
}

}  // namespace fastclip::cpu
