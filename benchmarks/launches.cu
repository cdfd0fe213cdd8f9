// Times the kernels alone, without torch and with a cold L2 cache: the norm phase; both phases in
// one launch and in two, with and without something to clip; and large kernel parameters. A copy of
// the same bytes is timed for comparison. Prints one JSON object per line. gpu.py builds and runs
// this program. It includes launch.cu, so that it can launch the kernels themselves.
#include <cstdio>
#include <functional>
#include <map>

#include "../csrc/cuda/launch.cu"

using namespace fastclip;
using namespace fastclip::cuda;

constexpr int kTensors = 64, kRounds = 41;
// More bytes than any L2 cache holds, and enough that the host can enqueue a contestant while the
// GPU reads them.
constexpr int64_t kStrangeBytes = int64_t{1} << 30;

// Reads memory that no contestant uses, so that the L2 cache holds none of their data, and no line
// that is still to be written back. While it runs, the host enqueues the contestant, so that the
// host's time is not measured.
__global__ void flush_kernel(const uint4* strange, int64_t count, uint32_t* never) {
  uint32_t seen = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    seen |= strange[i].x;
  if (seen) *never = seen;  // never true, but it keeps the compiler from removing the reads
}

struct Turn {
  float ms;
  bool is_late;  // the GPU began before the host had enqueued all: the host's time is included
};

struct Bench {
  int64_t bytes;
  char *data, *target;
  double data_norm;  // after all clips so far
  uint4* strange;
  double* partials;
  float* result;
  Stream stream{0, nullptr};
  cudaEvent_t start, stop;

  explicit Bench(int64_t size) : bytes(size) {
    check(cudaMalloc(&strange, kStrangeBytes), "cudaMalloc", 0);
    check(cudaMemset(strange, 0, kStrangeBytes), "cudaMemset", 0);
    check(cudaMalloc(&partials, 1 << 20), "cudaMalloc", 0);
    check(cudaMalloc(&result, 4), "cudaMalloc", 0);
    check(cudaMalloc(&data, bytes), "cudaMalloc", 0);
    check(cudaMalloc(&target, bytes), "cudaMalloc", 0);
    check(cudaMemset(data, 0x3d, bytes), "cudaMemset", 0);
    check(cudaEventCreate(&start), "cudaEventCreate", 0);
    check(cudaEventCreate(&stop), "cudaEventCreate", 0);
    run([&](const auto& table, const Work& work) { phase<Phases::kBoth>(table, work); }, 1e30);
    float norm = 0;
    check(cudaMemcpy(&norm, result, 4, cudaMemcpyDeviceToHost), "cudaMemcpy", 0);
    data_norm = norm;
  }

  ~Bench() {
    cudaFree(data), cudaFree(target), cudaFree(strange), cudaFree(partials), cudaFree(result);
    cudaEventDestroy(start), cudaEventDestroy(stop);
  }

  template <Phases phases, class Table>
  void phase(const Table& table, const Work& work) {
    if (!launch("a phase", clip_kernel<phases, Norm::kSquares, Table>, table.spans, table, work,
                stream, phases == Phases::kBoth))
      throw std::runtime_error("the device cannot make a grid resident");
  }

  template <class T = SmallTable, class Launch>
  Turn run(Launch&& launches, double max_norm) {
    std::vector<Item> items;
    const int64_t each = bytes / kTensors / 4;
    for (int i = 0; i < kTensors; ++i)
      items.push_back({{data + 4 * each * i, each, Dtype::kFloat}, 0});
    const Partition partition(items, false);
    T table;
    partition.fill(table, 0);
    const Work work{.number = max_norm,
                    .norms = {result, false},
                    .partials = partials,
                    .spans = static_cast<int>(partition.spans())};
    flush_kernel<<<1024, 512>>>(strange, kStrangeBytes / sizeof(uint4),
                                reinterpret_cast<uint32_t*>(result));
    cudaEventRecord(start);
    launches(table, work);
    const bool is_late = cudaEventQuery(start) != cudaErrorNotReady;
    cudaGetLastError();  // clears cudaErrorNotReady, which is expected
    cudaEventRecord(stop);
    check(cudaEventSynchronize(stop), "a benchmark", 0);
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    return {ms, is_late};
  }

  // The contestants take turns; every clip finds something to clip.
  void race() {
    using Contestant = std::function<Turn()>;
    const double nothing = 1e30;
    const auto less = [&] { return data_norm *= 0.999; };
    const auto fused = [&](const auto& t, const Work& w) { phase<Phases::kBoth>(t, w); };
    const auto apart = [&](const auto& t, const Work& w) {
      phase<Phases::kNorm>(t, w);
      phase<Phases::kScale>(t, w);
    };
    const auto norm = [&](const auto& t, const Work& w) { phase<Phases::kNorm>(t, w); };
    const auto copy = [&](const auto&, const Work&) {
      check(cudaMemcpyAsync(target, data, bytes, cudaMemcpyDeviceToDevice, 0), "a copy", 0);
    };
    const std::map<const char*, Contestant> contestants = {
        {"copy", [&] { return run(copy, 0); }},
        {"norm phase", [&] { return run(norm, 0); }},
        {"fused, nothing to clip", [&] { return run(fused, nothing); }},
        {"apart, nothing to clip", [&] { return run(apart, nothing); }},
        {"fused, clips", [&] { return run(fused, less()); }},
        {"apart, clips", [&] { return run(apart, less()); }},
        {"fused, 32 KB parameters, nothing to clip",
         [&] { return run<LargeTable>(fused, nothing); }},
    };
    std::map<const char*, std::vector<float>> times;
    std::map<const char*, int> late;
    for (int round = -1; round < kRounds; ++round)
      for (const auto& [name, contestant] : contestants) {
        const auto [ms, is_late] = contestant();
        if (round < 0) continue;  // CUDA loads a kernel at its first launch
        times[name].push_back(ms);
        late[name] += is_late;
      }
    for (auto& [name, ms] : times) {
      std::nth_element(ms.begin(), ms.begin() + kRounds / 2, ms.end());
      std::printf("{\"launch\": \"%s\", \"megabytes\": %g, \"us\": %.3f, \"late\": %d}\n", name,
                  bytes / 1e6, 1e3 * ms[kRounds / 2], late[name]);
    }
    std::fflush(stdout);  // keeps these lines if a larger size crashes
  }
};

int main() {
  for (const int64_t megabytes : {1, 10, 20, 40, 80, 100, 160})
    Bench(megabytes * 1000000 / (16 * kTensors) * 16 * kTensors).race();
}
