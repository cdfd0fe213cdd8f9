// The kernels and their launches. All kernels consist of the same device functions, so that fused
// and separate launches differ in speed alone.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "norm.cuh"
#include "scale.cuh"

namespace fastclip::cuda {
namespace {

// All kernel parameters may have 4 KiB, or 32 764 bytes if CUDA and driver are 12.1 or later.
constexpr int kLargeParameters = 12010;
using SmallTable = Table<4096 - sizeof(Work)>;
using LargeTable = Table<(CUDART_VERSION >= kLargeParameters ? 32764 : 4096) - sizeof(Work)>;

// For a range of groups: the index of the first span (a run of tiles) of each, and the last one's
// end.
struct Groups {
  static constexpr int kGroups = 1000;
  int count, first;
  uint32_t begins[kGroups + 1];
};

// The number that a kernel is given: max_norm, the coef of a group, or the bound of a clamp.
__device__ double number(const Work& work, int group) {
  if (!work.given.data) return work.number;
  const int i = work.groups > 1 ? group : 0;
  return work.given.is_double ? static_cast<const double*>(work.given.data)[i]
                              : static_cast<const float*>(work.given.data)[i];
}

__device__ void store(Numbers numbers, int i, double value) {
  if (numbers.is_double)
    static_cast<double*>(numbers.data)[i] = value;
  else
    static_cast<float*>(numbers.data)[i] = static_cast<float>(value);
}

// How many blocks share a multiprocessor. Three have 96 KiB of loads in flight together, and leave
// 40 registers for each thread.
constexpr int kResident = 3;

// kBoth needs all blocks of the grid resident at once.
enum class Phases { kNorm, kScale, kBoth };

template <Phases phases, Norm kind, class Table>
__global__ void __launch_bounds__(kThreads, kResident)
    clip_kernel(const __grid_constant__ Table table, const Work work) {
  if constexpr (phases != Phases::kScale) {
    norm_phase<kind>(table, [&](int span, double partial) {
      if (work.spans > 0)
        work.partials[span] = partial;
      else
        store(work.norms, span, norm_of<kind>(partial));
    });
    if constexpr (phases == Phases::kNorm) return;
    cooperative_groups::this_grid().sync();
  }
  // Every block adds up all partial results: sharing one block's sum would take a second barrier.
  const double norm = finish<kind>(work.partials, work.spans);
  if (blockIdx.x == 0 && threadIdx.x == 0) store(work.norms, 0, norm);
  const double coef = clip_coef_as(work.norms.is_double, norm, number(work, 0));
  if (coef != 1) change_phase<Multiply>(table, [=](int) { return coef; });
}

template <Norm kind>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Groups groups, const Work work) {
  for (int i = blockIdx.x; i < groups.count; i += gridDim.x) {
    const uint32_t begin = groups.begins[i], end = groups.begins[i + 1];
    const double norm = finish<kind>(work.partials + begin, static_cast<int>(end - begin));
    if (threadIdx.x == 0) store(work.norms, groups.first + i, norm);
  }
}

template <class Change, class Table>
__global__ void __launch_bounds__(kThreads, 2)
    change_kernel(const __grid_constant__ Table table, const Work work) {
  change_phase<Change>(table, [&](int group) { return number(work, group); });
}

void check(cudaError_t status, const char* what, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error: it is reported here, and only here
  throw std::runtime_error("fastclip: " + std::string(what) + " on device " +
                           std::to_string(device) + " failed: " + cudaGetErrorString(status) +
                           " (or an earlier kernel did: CUDA_LAUNCH_BLOCKING=1 tells which). To do "
                           "without the kernels, set FASTCLIP_KERNELS=0 on all ranks");
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute", device);
  return value;
}

bool takes_large_tables() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= kLargeParameters;
}

void for_norm(Norm kind, auto&& visit) {
  pick<Norm::kSum, Norm::kSquares, Norm::kMax>(kind, visit);
}

// Launches as many blocks as can be resident at once, but no more than there are tasks. `together`
// asks for a cooperative launch, for a grid barrier; returns false if the device has no room.
template <class Parameters>
bool launch(const char* what, void (*kernel)(Parameters, Work), int tasks,
            const Parameters& parameters, const Work& work, Stream stream, bool together = false) {
  int most = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, kernel, kThreads, 0), what,
        stream.device);
  most *= attribute(cudaDevAttrMultiProcessorCount, stream.device);
  void* arguments[] = {const_cast<Parameters*>(&parameters), const_cast<Work*>(&work)};
  const auto run = together ? cudaLaunchCooperativeKernel<void(Parameters, Work)>
                            : cudaLaunchKernel<void(Parameters, Work)>;
  const cudaError_t status =
      run(kernel, dim3(std::clamp(tasks, 1, std::max(1, most))), dim3(kThreads), arguments, 0,
          static_cast<cudaStream_t>(stream.handle));
  // Another process or context may hold part of the device.
  if (together && status == cudaErrorCooperativeLaunchTooLarge) return cudaGetLastError(), false;
  check(status, what, stream.device);
  return true;
}

// Calls visit(table) for the tables that hold the partition, one after the other; even an empty
// partition has a table. A launch copies a whole table, so small tables are used if they suffice.
void for_each_table(const Partition& partition, auto&& visit) {
  const auto visit_all = [&]<class Table>(std::type_identity<Table>) {
    Table table;
    int64_t begin = 0;
    do {
      begin = partition.fill(table, begin);
      visit(table);
    } while (begin < partition.tiles());
  };
  if (partition.entries() > SmallTable::kEntries && takes_large_tables())
    visit_all(std::type_identity<LargeTable>());
  else
    visit_all(std::type_identity<SmallTable>());
}

template <Phases phases>
bool launch_phases(const char* what, const Partition& partition, const Work& work, Stream stream) {
  bool done = false;
  for_norm(work.kind, [&]<Norm kind>() {
    for_each_table(partition, [&]<class Table>(const Table& table) {
      done = launch(what, clip_kernel<phases, kind, Table>, table.spans, table, work, stream,
                    phases == Phases::kBoth);
    });
  });
  return done;
}

// Whether both phases are to be one launch. For gradients larger than the L2 cache, fusing would
// save only a thousandth of the time. The caller must also rule out deadlocks: a cooperative launch
// waits for room for all its blocks, and so for a running collective, which may wait for a rank
// that queued its clip before that collective. So clip_norm_cuda fuses only where
// has_process_groups is false.
bool is_fused(const Partition& partition, int device) {
  const size_t entries = takes_large_tables() ? LargeTable::kEntries : SmallTable::kEntries;
  return partition.entries() <= entries && partition.tiles() <= kMaxTableTiles &&
         partition.bytes() <= attribute(cudaDevAttrL2CacheSize, device) &&
         attribute(cudaDevAttrCooperativeLaunch, device);
}

}  // namespace

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

const char* refusal(int device) {
  int major = 0, minor = 0;
  const cudaError_t status =
      std::max(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (status != cudaSuccess) return cudaGetLastError(), cudaGetErrorString(status);
  // Machine code runs on later minors of its major version, and the newest PTX on all later GPUs.
  const std::vector<int> built = architectures();
  const bool runs = std::ranges::any_of(built, [&](int one) {
    return one <= 100 * major + 10 * minor && (one / 100 == major || one == built.back());
  });
  return runs ? nullptr : kNoCode;
}

void launch_norms(const Partition& partition, const Work& work, Stream stream) {
  launch_phases<Phases::kNorm>("the launch of the norm phase", partition, work, stream);
  if (partition.spans_are_groups(work.groups)) return;
  const std::vector<uint32_t> begins = partition.begins(work.groups);
  Groups groups;
  for (groups.first = 0; groups.first < work.groups; groups.first += groups.count) {
    groups.count = std::min(work.groups - groups.first, Groups::kGroups);
    std::copy_n(begins.begin() + groups.first, groups.count + 1, groups.begins);
    for_norm(work.kind, [&]<Norm kind>() {
      launch("the launch of finish_kernel", finish_kernel<kind>, groups.count, groups, work,
             stream);
    });
  }
}

void launch_clip(const Partition& measured, const Partition& scaled, bool may_fuse,
                 const Work& work, Stream stream) {
  if (may_fuse && &measured == &scaled && is_fused(scaled, stream.device) &&
      launch_phases<Phases::kBoth>("the launch of both phases", scaled, work, stream))
    return;
  launch_phases<Phases::kNorm>("the launch of the norm phase", measured, work, stream);
  launch_phases<Phases::kScale>("the launch of the scale phase", scaled, work, stream);
}

void launch_change(const Partition& partition, Change change, const Work& work, Stream stream) {
  for_each_table(partition, [&]<class Table>(const Table& table) {
    const bool scales = change == Change::kScale;
    const auto kernel = scales ? change_kernel<Multiply, Table> : change_kernel<Clamp, Table>;
    launch(scales ? "the launch of scale_kernel" : "the launch of clamp_kernel", kernel,
           table.spans, table, work, stream);
  });
}

}  // namespace fastclip::cuda
