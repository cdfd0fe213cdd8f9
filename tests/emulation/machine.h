// A GPU made of CPU threads: a block is an OS thread, its 512 threads are fibers that run until
// they wait for each other. Which goes on is drawn anew at every switch, or one warp runs ahead of
// the others as far as it can. So a barrier that is missing shows as a wrong result under some
// seed; one that not all threads reach ends the process with a message.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <functional>

namespace emulation {

// What the kernels ask a device for, and what a test may change between calls.
struct Machine {
  int multiprocessors = 2;
  int threads_per_multiprocessor = 1536;
  int driver = 13000;
  int cooperative = 1;
  int l2_bytes = 50 << 20;
  int held_blocks = 0;  // that another process keeps resident
  int process_groups = 0;
  int capability = 90;
  uint64_t seed = 0;
  int launches = 0;      // counts them
  int fail_launch = 0;   // the error of the next ones
  int fail_queries = 0;  // and of questions about the device
  int last_error = 0;    // until it is asked for
  int fault = 0;         // which planted one acts; 0: none
};

Machine& machine();

// Whether this planted fault acts.
inline bool planted(int fault) { return machine().fault == fault; }

// Runs a grid; returns a cudaError_t, which is then the last error. `together`: all blocks at once,
// as a grid barrier needs.
int run(unsigned blocks, unsigned threads, bool together, const std::function<void()>& kernel);

// For the thread that runs.
uint3 thread_index();
uint3 block_index();
dim3 grid_size();
void wait_for_block();
void wait_for_grid();
// Waits for its warp; what the lane has given whose number differs by `lanes` (xor).
uint64_t exchange(uint64_t bits, int lanes);

[[noreturn]] void fail(const char* what);

}  // namespace emulation
