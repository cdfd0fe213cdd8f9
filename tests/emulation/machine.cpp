// The scheduler: see machine.h.
#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

constexpr unsigned kThreads = 512, kWarp = 32, kWarps = kThreads / kWarp;
constexpr unsigned kResident = 12;  // blocks at once
// A kernel's parameters are copied onto each: 32 KiB.
constexpr size_t kStack = 128 << 10;

struct Grid {
  const std::function<void()>* kernel;
  unsigned blocks;
  bool together;
  std::barrier<>* barrier;
};

enum class Waits : char { kNot, kWarp, kBlock, kGrid, kDone };

class Block;
thread_local Block* current = nullptr;

// The fibers of one OS thread, kept from block to block and launch to launch.
class Block {
 public:
  Block() : fibers_(kThreads) {
    for (unsigned i = 0; i < kThreads; ++i) {
      Fiber& fiber = fibers_[i];
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED || getcontext(&fiber.start) != 0) fail("no memory for fibers");
      fiber.start.uc_stack.ss_sp = stack;
      // Each stack begins at another offset: at the same one they would evict each other's lines.
      fiber.start.uc_stack.ss_size = kStack - i * 128;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Block::life, 0);
    }
  }

  void run(const Grid& grid, unsigned index, uint64_t seed) {
    current = this;
    grid_ = &grid;
    index_ = index;
    random_.seed(seed);
    ahead_ = seed % 2;
    std::iota(ranks_.begin(), ranks_.end(), 0u);
    std::shuffle(ranks_.begin(), ranks_.end(), random_);
    done_ = 0;
    for (unsigned i = 0; i < kThreads; ++i) make_ready(i);
    while (done_ < kThreads) {
      if (ready_ == 0) release_all();
      thread_ = next();
      resume(fibers_[thread_]);
    }
  }

  // Called by a fiber: the scheduler goes on.
  void wait(Waits what) {
    const unsigned warp = thread_ / kWarp;
    waits_[thread_] = what;
    if (what == Waits::kWarp && ++arrived_[warp] == kWarp) {
      arrived_[warp] = 0;
      for (unsigned lane = 0; lane < kWarp; ++lane) make_ready(warp * kWarp + lane);
    } else if (what == Waits::kDone) {
      ++done_;
    }
    if (_setjmp(fibers_[thread_].at) == 0) _longjmp(scheduler_, 1);
  }

  uint64_t exchange(uint64_t bits, int lanes) {
    const unsigned thread = thread_;
    auto& sent = sent_[turns_[thread]];
    turns_[thread] = !turns_[thread];
    sent[thread] = bits;
    wait(Waits::kWarp);
    return sent[thread ^ lanes];
  }

  unsigned thread() const { return thread_; }
  unsigned index() const { return index_; }
  const Grid& grid() const { return *grid_; }

 private:
  struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false;
  };

  static void life() {
    for (;;) {
      (*current->grid_->kernel)();
      current->wait(Waits::kDone);
    }
  }

  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  void make_ready(unsigned i) {
    waits_[i] = Waits::kNot;
    warps_[i / kWarp].push_back(i);
    ++ready_;
  }

  // Of a warp that is ready, any lane: of any warp, or of one that runs ahead as far as it can.
  unsigned next() {
    unsigned rank = ahead_ ? 0 : random_() % kWarps;
    while (warps_[ranks_[rank]].empty()) rank = (rank + 1) % kWarps;
    std::vector<unsigned>& lanes = warps_[ranks_[rank]];
    std::swap(lanes[random_() % lanes.size()], lanes.back());
    const unsigned thread = lanes.back();
    lanes.pop_back();
    --ready_;
    return thread;
  }

  // Nobody can run: every thread of the block must be at the same barrier.
  void release_all() {
    const Waits what = waits_[0];
    for (const Waits each : waits_)
      if (each != what || what == Waits::kWarp) fail("a barrier that not all threads reach");
    if (what == Waits::kGrid) {
      if (!grid_->together) fail("a grid barrier in a launch that is not cooperative");
      grid_->barrier->arrive_and_wait();
    }
    for (unsigned i = 0; i < kThreads; ++i) make_ready(i);
  }

  std::vector<Fiber> fibers_;
  std::array<Waits, kThreads> waits_;
  // What threads exchange by turns: none writes twice before the others of its warp have read.
  std::array<std::array<uint64_t, kThreads>, 2> sent_;
  std::array<bool, kThreads> turns_ = {};
  std::array<unsigned, kWarps> arrived_ = {};        // lanes that wait for the others of their warp
  std::array<std::vector<unsigned>, kWarps> warps_;  // the lanes that are ready
  std::array<unsigned, kWarps> ranks_;
  bool ahead_ = false;
  std::mt19937_64 random_;
  const Grid* grid_ = nullptr;
  jmp_buf scheduler_;
  unsigned index_ = 0, thread_ = 0, ready_ = 0, done_ = 0;
};

// OS threads that live as long as the process: `__shared__` is theirs and keeps what an earlier
// block has left in it.
class Workers {
 public:
  Workers() : start_(kResident + 1), end_(kResident + 1) {
    for (unsigned i = 0; i < kResident; ++i) std::thread(&Workers::work, this, i).detach();
  }

  void run(const Grid& grid, uint64_t seed) {
    const std::lock_guard lock(mutex_);
    std::mt19937_64 random(seed);
    order_.resize(grid.blocks);
    std::iota(order_.begin(), order_.end(), 0u);
    std::shuffle(order_.begin(), order_.end(), random);
    grid_ = &grid;
    seed_ = seed;
    start_.arrive_and_wait();
    end_.arrive_and_wait();
  }

 private:
  void work(unsigned worker) {
    Block block;
    for (;;) {
      start_.arrive_and_wait();
      for (unsigned i = worker; i < order_.size(); i += kResident)
        block.run(*grid_, order_[i], seed_ * 1000003 + order_[i]);
      end_.arrive_and_wait();
    }
  }

  std::mutex mutex_;
  std::barrier<> start_, end_;
  std::vector<unsigned> order_;
  const Grid* grid_ = nullptr;
  uint64_t seed_ = 0;
};

}  // namespace

Machine& machine() {
  static Machine machine;
  return machine;
}

int run(unsigned blocks, unsigned threads, bool together, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (m.fail_launch) return m.last_error = m.fail_launch;
  const unsigned resident = m.multiprocessors * (m.threads_per_multiprocessor / kThreads);
  if (threads != kThreads || blocks == 0) return m.last_error = cudaErrorInvalidConfiguration;
  if (together && (!m.cooperative || blocks + m.held_blocks > std::min(resident, kResident)))
    return m.last_error = cudaErrorCooperativeLaunchTooLarge;
  static Workers& workers = *new Workers;
  std::barrier<> barrier(blocks);
  ++m.launches;
  workers.run({&kernel, blocks, together, &barrier}, m.seed + m.launches);
  return cudaSuccess;
}

uint3 thread_index() { return {current->thread(), 0, 0}; }
uint3 block_index() { return {current->index(), 0, 0}; }
dim3 grid_size() { return {current->grid().blocks, 1, 1}; }
void wait_for_block() { current->wait(Waits::kBlock); }
void wait_for_grid() { current->wait(Waits::kGrid); }
uint64_t exchange(uint64_t bits, int lanes) { return current->exchange(bits, lanes); }

void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

}  // namespace emulation

cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(std::exchange(emulation::machine().last_error, 0));
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge ? "too many blocks" : "planted error";
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  emulation::Machine& m = emulation::machine();
  if (m.fail_queries) return static_cast<cudaError_t>(m.last_error = m.fail_queries);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = m.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = m.threads_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = m.l2_bytes;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = m.cooperative;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = m.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = m.capability % 10;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::machine().driver;
  return cudaSuccess;
}
