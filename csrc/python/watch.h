// Whether Python lists and dicts still hold what they held: what tells a prepared clip that the
// parameters of a module or an optimizer are others now, in a nanosecond or two for each. Whoever
// makes a Watch keeps containers and contents alive, where the garbage collector sees it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../tensor_list.h"

namespace fastclip {

class [[gnu::visibility("hidden")]] Watch {
 public:
  explicit Watch(const std::vector<py::handle>& containers) {
    for (const py::handle container : containers) {
      containers_.push_back({container, PyDict_Check(container.ptr()) != 0, size_of(container)});
      for_each(containers_.back(), [this](PyObject* item) {
        held_.push_back(item);
        return true;
      });
    }
  }

  // Whether each container has the very same items, or values, in the same order.
  bool is_unchanged() const {
    auto held = held_.begin();
    for (size_t i = 0; i < containers_.size(); ++i) {
      prefetch_from(i);
      const Container& container = containers_[i];
      if (size_of(container.object) != container.size ||
          !for_each(container, [&](PyObject* item) { return *held++ == item; }))
        return false;
    }
    return true;
  }

 private:
  struct Container {
    py::handle object;
    bool is_dict;
    Py_ssize_t size;
  };

  // Containers lie scattered, and what they hold elsewhere again.
  void prefetch_from(size_t i) const {
    if (i + 2 * kAhead < containers_.size())
      prefetch(containers_[i + 2 * kAhead].object.ptr(), sizeof(PyDictObject));
    if (i + kAhead < containers_.size() && containers_[i + kAhead].is_dict)
      prefetch(reinterpret_cast<PyDictObject*>(containers_[i + kAhead].object.ptr())->ma_keys, 128);
  }

  static Py_ssize_t size_of(py::handle container) {
    return PyDict_Check(container.ptr()) ? PyDict_Size(container.ptr())
                                         : PyList_GET_SIZE(container.ptr());
  }

  // Until `visit` says false; whether it never did.
  template <class Visit>
  static bool for_each(const Container& container, Visit&& visit) {
    PyObject* object = container.object.ptr();
    PyObject *key = nullptr, *value = nullptr;
    if (container.is_dict) {
      for (Py_ssize_t position = 0; PyDict_Next(object, &position, &key, &value);)
        if (!visit(value)) return false;
    } else {
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(object); ++i)
        if (!visit(PyList_GET_ITEM(object, i))) return false;
    }
    return true;
  }

  std::vector<Container> containers_;
  std::vector<PyObject*> held_;
};

}  // namespace fastclip
