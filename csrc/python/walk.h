// The walk: gradients, or what they wrap, are read from Python lists in C++.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "grads.h"

namespace fastclip {

// A set of addresses, as small as one can be: a third of a walk over thousands of parameters would
// go to a general one.
class Addresses {
 public:
  explicit Addresses(size_t count)
      : slots_(std::bit_ceil(count + count / 2 + 1)), shift_(std::countl_zero(slots_.size() - 1)) {}

  // Whether `address` is new.
  bool insert(const void* address) {
    size_t slot = (reinterpret_cast<uintptr_t>(address) * kGolden) >> shift_;
    for (; slots_[slot] != nullptr; slot = (slot + 1) & (slots_.size() - 1))
      if (slots_[slot] == address) return false;
    slots_[slot] = address;
    return true;
  }

 private:
  // 2^64 over the golden ratio spreads addresses that differ by multiples of anything.
  static constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

  std::vector<const void*> slots_;
  int shift_;
};

enum class What { kGrads, kTensors };

// The gradients of a list or tuple of parameters, without None and of each parameter once, or the
// tensors of such a list themselves; nothing if any of them is not plain and Python has to look.
// Each step of a batch only follows one pointer of every item, so that the cache misses of
// thousands of scattered objects overlap.
template <What what>
std::optional<PlainGrads> read(const py::object& list) {
  constexpr Py_ssize_t kBatch = 16;
  PyObject** items = PySequence_Fast_ITEMS(list.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
  PlainGrads grads;
  grads.reserve(count);
  Addresses seen(what == What::kGrads ? count : 0);
  for (Py_ssize_t begin = 0; begin < count; begin += kBatch) {
    const Py_ssize_t batch = std::min(kBatch, count - begin);
    c10::TensorImpl* impls[kBatch];
    const at::Tensor* found[kBatch];
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (begin + i + kBatch < count) prefetch(items[begin + i + kBatch], sizeof(PyObject) + 8);
      if (!THPVariable_CheckExact(items[begin + i])) return std::nullopt;
      found[i] = &THPVariable_Unpack(items[begin + i]);
      impls[i] = found[i]->unsafeGetTensorImpl();
      prefetch(impls[i], 64);
    }
    if (what == What::kGrads) {
      for (Py_ssize_t i = 0; i < batch; ++i) prefetch(impls[i]->autograd_meta(), 128);
      for (Py_ssize_t i = 0; i < batch; ++i) found[i] = &impls[i]->grad();
    }
    for (Py_ssize_t i = 0; i < batch; ++i)
      prefetch(found[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (!found[i]->defined()) continue;
      if (what == What::kGrads && !seen.insert(impls[i])) continue;
      if (!grads.add(*found[i])) return std::nullopt;
    }
  }
  return grads;
}

// How the tensors of a list wrap others. Of each item that wraps one, `layouts` holds what its
// attribute `layout` is, of a plain item None, and `slots` the norm to which its gradient counts.
// Whoever made this answers for the layouts being alive. Gradients may have others, of equal parts.
class Wrapped {
 public:
  Wrapped(const std::vector<py::handle>& layouts, std::vector<int64_t> slots, py::str layout,
          py::str inner, std::vector<py::str> parts)
      : layouts_(layouts),
        slots_(std::move(slots)),
        layout_(std::move(layout)),
        inner_(std::move(inner)),
        parts_(std::move(parts)) {}

  // What the gradients of the items, or the items themselves, wrap; nothing if the list is another,
  // a gradient is not laid out as its parameter, or not plain inside: Python has to look.
  template <What what>
  std::optional<PlainGrads> read(const py::list& list) const {
    const size_t count = list.size();
    if (count != layouts_.size()) return std::nullopt;
    PlainGrads grads;
    grads.reserve(count);
    Addresses seen(what == What::kGrads ? count : 0);
    for (size_t i = 0; i < count; ++i) {
      const py::handle item = PyList_GET_ITEM(list.ptr(), i);
      if (!is_tensor(item)) return std::nullopt;
      const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
      const at::Tensor& found = what == What::kGrads ? tensor.grad() : tensor;
      // A gradient that is laid out so says it of its parameter too.
      if ((layouts_[i].is_none() || !found.defined()) && !is_laid_out(item, i)) return std::nullopt;
      if (!found.defined()) continue;
      if (what == What::kGrads && !seen.insert(tensor.unsafeGetTensorImpl())) continue;
      if (layouts_[i].is_none()) {
        if (!grads.add(found)) return std::nullopt;
      } else {
        const auto wrapper = py::reinterpret_steal<py::object>(THPVariable_Wrap(found));
        if (!is_laid_out(wrapper, i) && !(is_laid_out(item, i) && is_equal(wrapper, i)))
          return std::nullopt;
        const py::object inner = attribute(wrapper, inner_);
        if (!inner || !THPVariable_CheckExact(inner.ptr())) return std::nullopt;
        if (!grads.add(THPVariable_Unpack(inner.ptr()))) return std::nullopt;
        grads.note(found);
      }
      grads.note(slots_[i]);
    }
    return grads;
  }

 private:
  // As isinstance, but for classes that only claim to be.
  static bool is_tensor(py::handle item) {
    return PyObject_TypeCheck(item.ptr(), reinterpret_cast<PyTypeObject*>(THPVariableClass));
  }

  bool is_laid_out(py::handle tensor, size_t i) const {
    if (layouts_[i].is_none()) return THPVariable_CheckExact(tensor.ptr());
    return attribute(tensor, layout_).is(layouts_[i]);
  }

  bool is_equal(py::handle wrapper, size_t i) const {
    const py::object own = attribute(wrapper, layout_);
    if (!own) return false;
    for (const py::str& part : parts_) {
      const py::object here = attribute(own, part), there = attribute(layouts_[i], part);
      if (!here || !there) return false;
      const int same = PyObject_RichCompareBool(here.ptr(), there.ptr(), Py_EQ);
      if (same < 0) PyErr_Clear();
      if (same <= 0) return false;
    }
    return true;
  }

  // Null if there is none.
  static py::object attribute(py::handle tensor, const py::str& name) {
    PyObject* value = PyObject_GetAttr(tensor.ptr(), name.ptr());
    if (value == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(value);
  }

  std::vector<py::handle> layouts_;
  std::vector<int64_t> slots_;
  py::str layout_, inner_;
  std::vector<py::str> parts_;
};

}  // namespace fastclip
