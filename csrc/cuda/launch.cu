// The kernels and their launches. All are made of the same device functions: what is fused and
// what is not differs in speed alone.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "norm.cuh"
#include "scale.cuh"

namespace fastclip::cuda {
namespace {

// With what else a kernel takes, a table fills the parameters: 4 KiB, or 32 764 bytes from CUDA
// 12.1 on, toolkit and driver.
constexpr int kLargeParameters = 12010;
using SmallTable = Table<4096 - sizeof(Work)>;
using LargeTable = Table<(CUDART_VERSION >= kLargeParameters ? 32764 : 4096) - sizeof(Work)>;

// Where the spans of some groups begin, and those of the last end.
struct Groups {
  static constexpr int kGroups = 1000;
  int count, first;
  uint32_t begins[kGroups + 1];
};

// max_norm, or the coef of a slot, or the bound.
__device__ double number(const Work& work, int slot) {
  if (!work.given.data) return work.number;
  const int i = work.slots > 1 ? slot : 0;
  return work.given.is_double ? static_cast<const double*>(work.given.data)[i]
                              : static_cast<const float*>(work.given.data)[i];
}

__device__ void store(Numbers numbers, int i, double value) {
  if (numbers.is_double)
    static_cast<double*>(numbers.data)[i] = value;
  else
    static_cast<float*>(numbers.data)[i] = static_cast<float>(value);
}

// Every block adds up the same partial results: a barrier less than one block telling the others.
// See Note [coef]; the decision is taken in the precision of the result.
template <Norm kind, class Table>
__device__ void finish_and_scale(const Table& table, const Work& work) {
  const double norm = finish<kind>(work.partials, work.spans, work.p);
  if (blockIdx.x == 0 && threadIdx.x == 0) store(work.norms, 0, norm);
  const double max_norm = number(work, 0);
  const double coef = work.norms.is_double
                          ? clip_coef(norm, max_norm)
                          : clip_coef(static_cast<float>(norm), static_cast<float>(max_norm));
  if (coef == 1) return;
  change_phase<Multiply>(table, [=](int) { return coef; });
}

// How many blocks share a multiprocessor: three hold 96 KiB of loads in flight, in 40 registers a
// thread. `pow` in float64 takes more.
template <Norm kind>
constexpr int kResident = kind == Norm::kPower ? 1 : 3;

// Both: by a grid whose blocks are all resident.
enum class Phases { kNorm, kScale, kBoth };

template <Phases phases, Norm kind, class Table>
__global__ void __launch_bounds__(kThreads, kResident<kind>)
    clip_kernel(const __grid_constant__ Table table, const Work work) {
  if constexpr (phases != Phases::kScale) norm_phase<kind>(table, work.p, work.partials);
  if constexpr (phases == Phases::kBoth) cooperative_groups::this_grid().sync();
  if constexpr (phases != Phases::kNorm) finish_and_scale<kind>(table, work);
}

template <Norm kind>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Groups groups, const Work work) {
  for (int g = blockIdx.x; g < groups.count; g += gridDim.x) {
    const uint32_t begin = groups.begins[g];
    const int spans = static_cast<int>(groups.begins[g + 1] - begin);
    const double norm = finish<kind>(work.partials + begin, spans, work.p);
    if (threadIdx.x == 0) store(work.norms, groups.first + g, norm);
  }
}

template <class Change, class Table>
__global__ void __launch_bounds__(kThreads, Change::kResident)
    change_kernel(const __grid_constant__ Table table, const Work work) {
  change_phase<Change>(table, [&](int slot) { return number(work, slot); });
}

void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error told here is not to be told again elsewhere
  throw std::runtime_error("fastclip: " + what + " failed: " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

bool takes_large_tables() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return driver >= kLargeParameters;
}

// Launches as many blocks as are resident at once, or as there is work for.
template <class Table>
void launch(const char* name, void (*kernel)(Table, Work), int resident, int tasks,
            const Table& table, const Work& work, Stream stream, bool cooperative = false) {
  const int threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, stream.device);
  const int most = attribute(cudaDevAttrMultiProcessorCount, stream.device) *
                   std::min(resident, std::max(1, threads / kThreads));
  void* arguments[] = {const_cast<Table*>(&table), const_cast<Work*>(&work)};
  const auto run = cooperative ? cudaLaunchCooperativeKernel<void(Table, Work)>
                               : cudaLaunchKernel<void(Table, Work)>;
  check(run(kernel, dim3(std::clamp(tasks, 1, most)), dim3(kThreads), arguments, 0,
            static_cast<cudaStream_t>(stream.handle)),
        "the launch of " + std::string(name) + " on device " + std::to_string(stream.device));
}

// Calls visit(table) for the tables that hold the partition, one after the other; for one empty
// table if there is nothing. The host copies all of a table, so it is as small as the list allows.
template <class Visit>
void for_each_table(const Partition& partition, Visit&& visit) {
  const auto visit_all = [&]<class Table>(std::type_identity<Table>) {
    Table table;
    int64_t begin = 0;
    do {
      begin = partition.fill(table, begin);
      visit(table);
    } while (begin < partition.tiles());
  };
  if (partition.parts() > SmallTable::kEntries && takes_large_tables())
    visit_all(std::type_identity<LargeTable>());
  else
    visit_all(std::type_identity<SmallTable>());
}

template <class Visit>
void for_norm(double p, Visit&& visit) {
  pick<Norm::kSum, Norm::kSquares, Norm::kMax, Norm::kPower>(norm_kind(p), visit);
}

template <Phases phases>
void launch_phases(const char* name, const Partition& partition, const Work& work, Stream stream) {
  for_norm(work.p, [&]<Norm kind>() {
    for_each_table(partition, [&]<class Table>(const Table& table) {
      launch(name, clip_kernel<phases, kind, Table>, kResident<kind>, table.spans, table, work,
             stream, phases == Phases::kBoth);
    });
  });
}

}  // namespace

std::vector<int> architectures() { return {__CUDA_ARCH_LIST__}; }

bool serves(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return cudaGetLastError() == cudaSuccess;
  // Machine code runs on later minors of its major, the PTX of the newest on all that is later.
  const std::vector<int> built = architectures();
  for (const int one : built)
    if (one <= 100 * major + 10 * minor && (one / 100 == major || one == built.back())) return true;
  return false;
}

void launch_norms(const Partition& partition, const Work& work, Stream stream) {
  launch_phases<Phases::kNorm>("the norm phase", partition, work, stream);
  const std::vector<uint32_t> begins = partition.begins(work.slots);
  Groups groups{};
  for (; groups.first < work.slots; groups.first += groups.count) {
    groups.count = std::min(work.slots - groups.first, Groups::kGroups);
    std::copy_n(begins.begin() + groups.first, groups.count + 1, groups.begins);
    for_norm(work.p, [&]<Norm kind>() {
      launch("finish_kernel", finish_kernel<kind>, 1, groups.count, groups, work, stream);
    });
  }
}

void launch_clip(const Partition& measured, const Partition& scaled, const Work& work,
                 Stream stream) {
  const size_t entries = takes_large_tables() ? LargeTable::kEntries : SmallTable::kEntries;
  const bool fits = scaled.parts() <= entries && scaled.tiles() <= kMaxTableTiles;
  if (&measured == &scaled && fits && attribute(cudaDevAttrCooperativeLaunch, stream.device)) {
    launch_phases<Phases::kBoth>("both phases", scaled, work, stream);
  } else {
    launch_phases<Phases::kNorm>("the norm phase", measured, work, stream);
    launch_phases<Phases::kScale>("the scale phase", scaled, work, stream);
  }
}

void launch_change(const Partition& partition, const Work& work, Stream stream) {
  for_each_table(partition, [&]<class Table>(const Table& table) {
    if (work.given.data)
      launch("scale_kernel", change_kernel<Multiply, Table>, Multiply::kResident, table.spans,
             table, work, stream);
    else
      launch("clamp_kernel", change_kernel<Clamp, Table>, Clamp::kResident, table.spans, table,
             work, stream);
  });
}

}  // namespace fastclip::cuda
