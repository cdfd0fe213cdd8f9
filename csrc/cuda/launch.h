// Launches of the kernels, on the given stream of the current device, whose memory all pointers are
// to. Nothing waits. A launch that fails raises std::runtime_error with the name of its kernel.
#pragma once

#include <vector>

#include "partition.h"

namespace fastclip::cuda {

// The architectures compiled in, as 100 * major + 10 * minor.
std::vector<int> architectures();

// Why the kernels do not run on a device: kNoCode, or in CUDA's words, of a driver that is too old
// for instance; null where they run.
constexpr const char* kNoCode = "no code for its architecture";
const char* refusal(int device);

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// Float32 or float64, on the device.
struct Numbers {
  void* data = nullptr;
  bool is_double = false;
};

// What a kernel works with besides its tensors; each launch names what it uses.
struct Work {
  Norm kind = Norm::kSquares;
  double number = 0;           // max_norm or bound
  Numbers given = {};          // max_norm or coef; without data it is `number`
  Numbers norms = {};          // the result
  double* partials = nullptr;  // one for each span
  int spans = 0;               // their number. 0: none are kept, a span's norm is its group's
  int groups = 1;
};

// The norm of each group; for several groups the partition is apart and sorted.
void launch_norms(const Partition& partition, const Work& work, Stream stream);

// The norm of what is measured, and the rest scaled to max_norm: one launch, if it `may_fuse` them,
// or two, the same bits.
void launch_clip(const Partition& measured, const Partition& scaled, bool may_fuse, const Work&,
                 Stream);

// The tensors scaled by the coef of their group, or the only one; or clamped to the bound.
enum class Change { kScale, kClamp };
void launch_change(const Partition& partition, Change change, const Work& work, Stream stream);

}  // namespace fastclip::cuda
