// Python objects that are tensors. What torch's C++ has for that may change with any version of
// torch; nothing but this file uses it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace fastclip {

// As isinstance, but for classes that only claim to be.
inline bool is_tensor(py::handle object) {
  return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Whether it is a tensor or parameter of torch's own class.
inline bool is_exact_tensor(py::handle object) { return THPVariable_CheckExact(object.ptr()); }

// What a tensor in Python holds, which lives as long as that.
inline const at::Tensor& unpack(py::handle tensor) { return THPVariable_Unpack(tensor.ptr()); }

inline py::object wrap(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

}  // namespace fastclip
