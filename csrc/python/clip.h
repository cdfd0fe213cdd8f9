// `clip_grad_norm_` for its usual arguments, in one C++ call: right after backward, the CPU caches
// have lost Python's code. Unusual or wrong arguments are left to Python, which checks them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/scalar_tensor.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <optional>

#include "walk.h"

namespace fastclip {

// The value of a float or int; NaN for any other object, and for an int too large for a double.
inline double as_number(py::handle value) {
  const bool is_number = PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr());
  const double found = is_number ? PyFloat_AsDouble(value.ptr()) : NAN;
  if (PyErr_Occurred() == nullptr) return found;
  PyErr_Clear();
  return NAN;
}

// Whether a threshold needs no check in Python: it is a number >= 0, or a 0-d tensor.
inline bool is_usual(py::handle max_norm) {
  if (!is_tensor(max_norm)) return as_number(max_norm) >= 0;
  const at::Tensor& tensor = unpack(max_norm);
  return is_exact_tensor(max_norm) && tensor.dim() == 0 && tensor.layout() == at::kStrided &&
         !tensor.is_meta();
}

// `max_norm` is a tensor, or a number, which becomes a tensor on the CPU.
inline at::Tensor clip_norm(const PlainGrads& grads, py::handle max_norm, double p,
                            const std::optional<at::Tensor>& norm) {
  if (is_tensor(max_norm)) return grads.clip_norm_(unpack(max_norm), p, norm);
  return grads.clip_norm_(at::scalar_tensor(max_norm.cast<double>(), at::kDouble), p, norm);
}

// Clips the gradients of a list or tuple of parameters, by a number or a 0-d tensor. Changes
// nothing and returns nullopt if any argument is unusual.
inline std::optional<at::Tensor> clip_grad_norm(const py::object& parameters, py::handle max_norm,
                                                py::handle norm_type) {
  if (!PyList_CheckExact(parameters.ptr()) && !PyTuple_CheckExact(parameters.ptr()))
    return std::nullopt;
  const double p = as_number(norm_type);
  if (!(p > 0) || !is_usual(max_norm)) return std::nullopt;
  const auto grads = read<Source::kGrads>(parameters);
  if (!grads || grads->size() == 0) return std::nullopt;
  return clip_norm(*grads, max_norm, p, std::nullopt);
}

}  // namespace fastclip
