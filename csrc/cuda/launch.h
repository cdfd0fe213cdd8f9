// Launches of the kernels on a stream of the current device, with pointers to its memory. They do
// not wait for the GPU. A launch that fails throws std::runtime_error with the kernel's name.
#pragma once

#include <vector>

#include "partition.h"

namespace fastclip::cuda {

// The architectures compiled in, as 100 * major + 10 * minor.
std::vector<int> architectures();

// Why the kernels cannot run on a device: kNoCode, or CUDA's own message, for instance about a
// driver that is too old; null if they can run.
constexpr const char* kNoCode = "no code for its architecture";
const char* refusal(int device);

struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

// An array of float32 or float64 on the device.
struct Numbers {
  void* data = nullptr;
  bool is_double = false;
};

// The arguments of a kernel besides its tensors. Each kernel uses only some of them.
struct Work {
  Norm kind = Norm::kSquares;
  double number = 0;           // max_norm or bound
  Numbers given = {};          // max_norm or coef; if null, `number` is used instead
  Numbers norms = {};          // the result
  double* partials = nullptr;  // one partial result for each span
  int spans = 0;               // length of `partials`; 0: each group is one span, stored in `norms`
  int groups = 1;
};

// Computes the norm of each group. Several groups need a partition made with `apart`.
void launch_norms(const Partition& partition, const Work& work, Stream stream);

// Computes the norm of `measured` and scales `scaled` by the coefficient that follows from this
// norm and max_norm. This is one launch if `may_fuse` and the device allow it, else two; the bits
// are the same.
void launch_clip(const Partition& measured, const Partition& scaled, bool may_fuse, const Work&,
                 Stream);

// Scales each tensor by the coef of its group, or by the only coef; or clamps all to the bound.
enum class Change { kScale, kClamp };
void launch_change(const Partition& partition, Change change, const Work& work, Stream stream);

}  // namespace fastclip::cuda
