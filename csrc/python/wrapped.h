// The walk over tensors that wrap others, as DTensors do: what they wrap is read.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <structmember.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "walk.h"

namespace fastclip {

// An attribute of objects. Where their class has a slot for it, it is read from there; else it is
// asked for by its name.
class Attribute {
 public:
  explicit Attribute(py::str name) : name_(std::move(name)) {}

  // Null if there is none.
  py::object of(py::handle object) const {
    if (!class_.is(py::type::handle_of(object))) look_at(py::type::of(object));
    if (offset_ > 0) {
      const char* slot = reinterpret_cast<const char*>(object.ptr()) + offset_;
      return py::reinterpret_borrow<py::object>(*reinterpret_cast<PyObject* const*>(slot));
    }
    PyObject* value = PyObject_GetAttr(object.ptr(), name_.ptr());
    if (value == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  void look_at(py::type type) const {
    const auto* raw = reinterpret_cast<const PyTypeObject*>(type.ptr());
    const py::object found = py::getattr(type, name_, py::none());
    offset_ = 0;
    if (Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type) &&
        raw->tp_getattro == PyObject_GenericGetAttr) {
      const auto* member = reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member;
      if (member->type == T_OBJECT_EX) offset_ = member->offset;
    }
    class_ = std::move(type);
  }

  py::str name_;
  // The class that was seen last, and where its objects have it.
  mutable py::object class_;
  mutable Py_ssize_t offset_ = 0;
};

// How the tensors of a list wrap others. Of each item that wraps one, `layouts` holds what its
// attribute `layout` is, of a plain item None, and `slots` the norm to which its gradient counts.
// Whoever made this answers for the layouts being alive. Gradients, and tensors that are measured,
// may have others, of equal parts.
class Wrapped {
 public:
  Wrapped(const std::vector<py::handle>& layouts, std::vector<int64_t> slots, py::str layout,
          py::str inner, std::vector<py::str> parts)
      : layouts_(layouts),
        slots_(std::move(slots)),
        layout_(std::move(layout)),
        inner_(std::move(inner)) {
    for (py::str& part : parts) parts_.emplace_back(std::move(part));
  }

  // What the gradients of the items, or the items themselves, wrap; nothing if the list is another,
  // a gradient is not laid out as its parameter, or not plain inside: Python has to look.
  template <What what>
  std::optional<PlainGrads> read(const py::list& list) const {
    // Python compares layouts, and meanwhile another thread may change the list.
    const auto items = py::reinterpret_steal<py::tuple>(PyList_AsTuple(list.ptr()));
    const size_t count = items.size();
    if (count != layouts_.size()) return std::nullopt;
    PlainGrads grads;
    grads.reserve(count);
    Addresses seen(what == What::kGrads ? count : 0);
    for (size_t begin = 0; begin < count; begin += kTogether) {
      const size_t batch = std::min<size_t>(kTogether, count - begin);
      const at::Tensor *tensors[kTogether], *found[kTogether];
      py::object wrappers[kTogether], inners[kTogether];
      for (size_t i = 0; i < batch; ++i) {
        if (begin + i + kTogether < count)
          prefetch(PyTuple_GET_ITEM(items.ptr(), begin + i + kTogether), 2 * sizeof(PyObject));
        const py::handle item = PyTuple_GET_ITEM(items.ptr(), begin + i);
        if (!is_tensor(item)) return std::nullopt;
        tensors[i] = found[i] = &unpack(item);
        prefetch(found[i]->unsafeGetTensorImpl(), 64);
      }
      if (what == What::kGrads) follow_grads(found, batch);
      for (size_t i = 0; i < batch; ++i)
        prefetch(found[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      for (size_t i = 0; i < batch; ++i) {
        const bool wraps = !layouts_[begin + i].is_none() && found[i]->defined();
        if (wraps) wrappers[i] = wrap(*found[i]);
      }
      for (size_t i = 0; i < batch; ++i) {
        if (!wrappers[i]) continue;
        inners[i] = inner_.of(wrappers[i]);
        if (!inners[i] || !is_exact_tensor(inners[i])) return std::nullopt;
        prefetch(unpack(inners[i]).unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      }
      for (size_t i = 0; i < batch; ++i) {
        const size_t at = begin + i;
        const py::handle item = PyTuple_GET_ITEM(items.ptr(), at);
        // A gradient that is laid out so says it of its parameter too.
        if (!wrappers[i] && !is_laid_out(item, at)) return std::nullopt;
        if (!found[i]->defined()) continue;
        if (what == What::kGrads && !seen.insert(tensors[i]->unsafeGetTensorImpl())) continue;
        // The items of a plan for parameters are those that it was made for; tensors may be others.
        const bool is_planned = what == What::kTensors || is_laid_out(item, at);
        if (wrappers[i] && !is_laid_out(wrappers[i], at) &&
            !(is_planned && is_equal(wrappers[i], at)))
          return std::nullopt;
        if (!grads.add(wrappers[i] ? unpack(inners[i]) : *found[i])) return std::nullopt;
        if (wrappers[i]) grads.note(unpack(wrappers[i]));
        grads.note(slots_[at]);
      }
    }
    return grads;
  }

 private:
  bool is_laid_out(py::handle tensor, size_t i) const {
    if (layouts_[i].is_none()) return is_exact_tensor(tensor);
    return layout_.of(tensor).is(layouts_[i]);
  }

  bool is_equal(py::handle wrapper, size_t i) const {
    const py::object own = layout_.of(wrapper);
    if (!own) return false;
    for (const Attribute& part : parts_) {
      const py::object here = part.of(own), there = part.of(layouts_[i]);
      if (!here || !there) return false;
      const int same = PyObject_RichCompareBool(here.ptr(), there.ptr(), Py_EQ);
      if (same < 0) PyErr_Clear();
      if (same <= 0) return false;
    }
    return true;
  }

  std::vector<py::handle> layouts_;
  std::vector<int64_t> slots_;
  Attribute layout_, inner_;
  std::vector<Attribute> parts_;
};

}  // namespace fastclip
