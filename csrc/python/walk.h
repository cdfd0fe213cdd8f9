// The walk: C++ goes through a Python list of parameters and reads their gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "grads.h"

namespace fastclip {

// A minimal set of addresses: a general-purpose hash set would take a third of the time of a walk
// over thousands of parameters.
class Addresses {
 public:
  explicit Addresses(size_t count)
      : slots_(std::bit_ceil(count + count / 2 + 1)), shift_(std::countl_zero(slots_.size() - 1)) {}

  // Adds `address`; returns whether it is new.
  bool insert(const void* address) {
    size_t slot = (reinterpret_cast<uintptr_t>(address) * kGolden) >> shift_;
    for (; slots_[slot] != nullptr; slot = (slot + 1) & (slots_.size() - 1))
      if (slots_[slot] == address) return false;
    slots_[slot] = address;
    return true;
  }

 private:
  // 2^64 divided by the golden ratio: multiplying by it spreads even equally spaced addresses.
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

  std::vector<const void*> slots_;
  int shift_;
};

enum class Source { kGrads, kTensors };  // the items' gradients, or the items themselves

// The items of a batch are read in steps, and each step follows one pointer of every item, so that
// the cache misses of thousands of scattered objects overlap.
constexpr Py_ssize_t kTogether = 16;

// Replaces tensors, already prefetched, by their gradients.
inline void follow_grads(const at::Tensor** tensors, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i)
    prefetch(tensors[i]->unsafeGetTensorImpl()->autograd_meta(), 128);
  for (Py_ssize_t i = 0; i < count; ++i) tensors[i] = &tensors[i]->unsafeGetTensorImpl()->grad();
}

// Returns the gradients of a list or tuple of parameters, without None and without repetitions; or
// the items of a list or tuple of tensors. Returns nullopt if any tensor to return is not plain, or
// if an item is of a subclass; Python then reads the items one by one.
template <Source source>
std::optional<PlainGrads> read(const py::object& list) {
  PyObject** items = PySequence_Fast_ITEMS(list.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
  PlainGrads grads;
  grads.reserve(count);
  Addresses seen(source == Source::kGrads ? count : 0);
  for (Py_ssize_t begin = 0; begin < count; begin += kTogether) {
    const Py_ssize_t batch = std::min(kTogether, count - begin);
    c10::TensorImpl* impls[kTogether];
    const at::Tensor* found[kTogether];
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (begin + i + kTogether < count)
        prefetch(items[begin + i + kTogether], sizeof(PyObject) + 8);
      if (!is_exact_tensor(items[begin + i])) return std::nullopt;
      found[i] = &unpack(items[begin + i]);
      impls[i] = found[i]->unsafeGetTensorImpl();
      prefetch(impls[i], 64);
    }
    if (source == Source::kGrads) follow_grads(found, batch);
    for (Py_ssize_t i = 0; i < batch; ++i)
      prefetch(found[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (!found[i]->defined()) continue;
      if (source == Source::kGrads && !seen.insert(impls[i])) continue;
      if (!grads.add(*found[i])) return std::nullopt;
    }
  }
  return grads;
}

}  // namespace fastclip
