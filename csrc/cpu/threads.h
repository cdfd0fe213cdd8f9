// Work on torch's own threads, whatever the compiler. at::parallel_for is a template with OpenMP's
// pragmas: clang would make calls of LLVM's OpenMP of them, a second runtime, which would fight
// with torch's for the cores. What g++ makes of them is called here by its name.
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

// Calls work(first, last), which does not throw, for shares of [0, size), each on its own thread.
// As many threads share as find `grain` to do.
template <class Work>
void parallel(int64_t size, int64_t grain, const Work& work) {
#if defined(__linux__) && AT_PARALLEL_OPENMP
  if (size <= grain || at::in_parallel_region() || at::get_num_threads() == 1) return work(0, size);
  auto share = [&] {
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), at::divup(size, grain));
    const int64_t length = at::divup(size, threads), first = omp_get_thread_num() * length;
    if (first < size) work(first, std::min(size, first + length));
  };
  // 0: all threads. Another number than the last call's makes the runtime start threads anew.
  GOMP_parallel([](void* data) { (*static_cast<decltype(share)*>(data))(); }, &share, 0, 0);
#else
  at::parallel_for(0, size, grain, work);
#endif
}

}  // namespace fastclip::cpu
