// The unmodified host functions of the CUDA kernels, registered for the emulated device.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(ns, PrivateUse1, m, C10_UID)

#include "../../csrc/cuda/ops.cpp"
