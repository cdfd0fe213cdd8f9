// The walk over tensors that wrap other tensors, such as DTensors: it reads the tensors inside.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "walk.h"

namespace fastclip {

// How the items of a list wrap tensors. `layouts` holds each item's attribute named `layout`, or
// None if the item is no wrapper; `groups` holds each item's group. The references to layouts are
// borrowed: the caller keeps them alive. A gradient may have another layout object than its
// parameter if the attributes named in `fields` are equal in both. The tensor inside is the
// attribute named `inner`.
class Wrapped {
 public:
  Wrapped(const std::vector<py::handle>& layouts, std::vector<int64_t> groups, py::str layout,
          py::str inner, std::vector<py::str> fields)
      : layouts_(layouts),
        groups_(std::move(groups)),
        layout_(std::move(layout)),
        inner_(std::move(inner)),
        fields_(std::move(fields)) {}

  // Returns the tensors inside the items' gradients, or inside the items themselves. Returns
  // nullopt if the items do not have the layouts that the constructor was given, or a gradient has
  // a different layout or is not plain inside; Python then reads the items one by one.
  template <Source source>
  std::optional<PlainGrads> read(const py::list& list) const {
    // A copy: comparing layouts runs Python code, so another thread may change the list meanwhile.
    const auto items = py::reinterpret_steal<py::tuple>(PyList_AsTuple(list.ptr()));
    const size_t count = items.size();
    if (count != layouts_.size()) return std::nullopt;
    PlainGrads grads;
    grads.reserve(count);
    Addresses seen(source == Source::kGrads ? count : 0);
    for (size_t i = 0; i < count; ++i) {
      if (i % kTogether == 0) prefetch_batch<source>(items, i);
      const py::handle item = PyTuple_GET_ITEM(items.ptr(), i);
      const bool wraps = !layouts_[i].is_none();
      if (!is_tensor(item) || (wraps ? !is_laid_out(item, i) : !is_exact_tensor(item)))
        return std::nullopt;
      const at::Tensor& tensor = unpack(item);
      const at::Tensor& found = source == Source::kGrads ? tensor.grad() : tensor;
      if (!found.defined()) continue;
      if (source == Source::kGrads && !seen.insert(tensor.unsafeGetTensorImpl())) continue;
      if (!wraps) {
        if (!grads.add(found)) return std::nullopt;
      } else {
        const py::object wrapper = wrap(found), inner = attribute(wrapper, inner_);
        if (!inner || !is_exact_tensor(inner)) return std::nullopt;
        if (!is_laid_out(wrapper, i) && !is_equal(wrapper, i)) return std::nullopt;
        if (!grads.add(unpack(inner))) return std::nullopt;
        grads.add_wrapper(unpack(wrapper));
      }
      grads.add_group(groups_[i]);
    }
    return grads;
  }

 private:
  // Fetches the objects of some items from `begin` on, as far as they are tensors.
  template <Source source>
  static void prefetch_batch(const py::tuple& items, size_t begin) {
    const at::Tensor* found[kTogether];
    Py_ssize_t count = 0;
    for (size_t i = begin; i < std::min(begin + kTogether, items.size()); ++i) {
      const py::handle item = PyTuple_GET_ITEM(items.ptr(), i);
      if (!is_tensor(item)) break;
      found[count] = &unpack(item);
      prefetch(found[count++]->unsafeGetTensorImpl(), 64);
    }
    if (source == Source::kGrads) follow_grads(found, count);
    for (Py_ssize_t i = 0; i < count; ++i)
      prefetch(found[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
  }

  // Null if the object has no such attribute.
  static py::object attribute(py::handle object, const py::str& name) {
    PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (value == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(value);
  }

  bool is_laid_out(py::handle tensor, size_t i) const {
    return attribute(tensor, layout_).is(layouts_[i]);
  }

  bool is_equal(py::handle wrapper, size_t i) const {
    const py::object own = attribute(wrapper, layout_);
    if (!own) return false;
    for (const py::str& field : fields_) {
      const py::object here = attribute(own, field), there = attribute(layouts_[i], field);
      if (!here || !there) return false;
      const int same = PyObject_RichCompareBool(here.ptr(), there.ptr(), Py_EQ);
      if (same < 0) PyErr_Clear();
      if (same <= 0) return false;
    }
    return true;
  }

  std::vector<py::handle> layouts_;
  std::vector<int64_t> groups_;
  py::str layout_, inner_;
  std::vector<py::str> fields_;
};

}  // namespace fastclip
