// Conversions between Python objects and tensors. torch's C++ functions for these may change with
// any version of torch; only this file uses them.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace fastclip {

// Looks at the actual type of the object; isinstance would also believe its `__class__`.
inline bool is_tensor(py::handle object) {
  return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Whether the object is a torch.Tensor or torch.nn.Parameter, and not of a subclass.
inline bool is_exact_tensor(py::handle object) { return THPVariable_CheckExact(object.ptr()); }

// The C++ tensor inside a Python tensor; the reference is valid as long as the Python object lives.
inline const at::Tensor& unpack(py::handle tensor) { return THPVariable_Unpack(tensor.ptr()); }

inline py::object wrap(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

}  // namespace fastclip
