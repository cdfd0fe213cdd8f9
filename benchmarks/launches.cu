// What the choice of launch costs, kernels alone and without torch: phases fused or apart, small or
// large parameters, with and without something to clip. Prints one JSON object a line. gpu.py
// builds and runs it; the sources are included so that their internals can be launched by hand.
#include <cstdio>
#include <functional>
#include <map>

#include "../csrc/cuda/launch.cu"

using namespace fastclip;
using namespace fastclip::cuda;

constexpr int kTensors = 64, kRounds = 41;
// More than any L2 cache holds: a buffer comes back only when the others have pushed it out.
constexpr int64_t kRotation = int64_t{1} << 30;

struct Buffer {
  char* data;
  double norm;  // as clipped so far
};

struct Bench {
  int64_t bytes;
  std::vector<Buffer> buffers;
  double* partials;
  float* result;
  Stream stream{0, nullptr};
  cudaEvent_t start, stop;

  explicit Bench(int64_t size) : bytes(size) {
    check(cudaMalloc(&partials, 1 << 20), "cudaMalloc");
    check(cudaMalloc(&result, 4), "cudaMalloc");
    for (int64_t used = 0; used < kRotation; used += bytes) {
      buffers.push_back({nullptr, 0});
      check(cudaMalloc(&buffers.back().data, bytes), "cudaMalloc");
      check(cudaMemset(buffers.back().data, 0x3d, bytes), "cudaMemset");
    }
    cudaEventCreate(&start), cudaEventCreate(&stop);
    for (Buffer& buffer : buffers) {
      run(
          buffer, [&](const auto& table, const Work& work) { phase<Phases::kBoth>(table, work); },
          1e30);
      float norm = 0;
      check(cudaMemcpy(&norm, result, 4, cudaMemcpyDeviceToHost), "cudaMemcpy");
      buffer.norm = norm;
    }
  }

  ~Bench() {
    for (Buffer& buffer : buffers) cudaFree(buffer.data);
    cudaFree(partials), cudaFree(result);
  }

  template <Phases phases, class Table>
  void phase(const Table& table, const Work& work) {
    launch("a phase", clip_kernel<phases, Norm::kSquares, Table>, 3, table.spans, table, work,
           stream, phases == Phases::kBoth);
  }

  template <class T = SmallTable, class Launch>
  float run(const Buffer& buffer, Launch&& launches, double max_norm) {
    std::vector<Part> parts;
    const int64_t each = bytes / kTensors / 4;
    for (int i = 0; i < kTensors; ++i)
      parts.push_back({{buffer.data + 4 * each * i, each, Dtype::kFloat}, 0});
    const Partition partition(parts, false);
    T table;
    partition.fill(table, 0);
    const Work work{.number = max_norm,
                    .norms = {result, false},
                    .partials = partials,
                    .spans = static_cast<int>(partition.spans())};
    cudaEventRecord(start);
    launches(table, work);
    cudaEventRecord(stop);
    check(cudaEventSynchronize(stop), "a benchmark");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    return ms;
  }

  // The contestants take turns, each on the next buffer; every clip finds something to clip.
  void race() {
    using Turn = std::function<float(Buffer&)>;
    const auto nothing = [](Buffer&) { return 1e30; };
    const auto clips = [](Buffer& buffer) { return buffer.norm *= 0.999; };
    const auto fused = [&](const auto& t, const Work& w) { phase<Phases::kBoth>(t, w); };
    const auto apart = [&](const auto& t, const Work& w) {
      phase<Phases::kNorm>(t, w);
      phase<Phases::kScale>(t, w);
    };
    const auto norm = [&](const auto& t, const Work& w) { phase<Phases::kNorm>(t, w); };
    const std::map<const char*, Turn> turns = {
        {"norm phase", [&](Buffer& b) { return run(b, norm, 0); }},
        {"fused, nothing to clip", [&](Buffer& b) { return run(b, fused, nothing(b)); }},
        {"apart, nothing to clip", [&](Buffer& b) { return run(b, apart, nothing(b)); }},
        {"fused, clips", [&](Buffer& b) { return run(b, fused, clips(b)); }},
        {"apart, clips", [&](Buffer& b) { return run(b, apart, clips(b)); }},
        {"fused, 32 KB parameters, nothing to clip",
         [&](Buffer& b) { return run<LargeTable>(b, fused, nothing(b)); }},
    };
    std::map<const char*, std::vector<float>> times;
    size_t next = 0;
    for (int round = 0; round < kRounds; ++round)
      for (const auto& [name, turn] : turns)
        times[name].push_back(turn(buffers[next++ % buffers.size()]));
    for (auto& [name, ms] : times) {
      std::nth_element(ms.begin(), ms.begin() + kRounds / 2, ms.end());
      std::printf("{\"launch\": \"%s\", \"megabytes\": %g, \"us\": %.3f}\n", name, bytes / 1e6,
                  1e3 * ms[kRounds / 2]);
    }
  }
};

int main() {
  for (const int64_t megabytes : {1, 10, 20, 40, 80, 100, 160})
    Bench(megabytes * 1000000 / (4 * kTensors) * 4 * kTensors).race();
}
