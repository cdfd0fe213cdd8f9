// `clip_grad_norm_` as it is called most, in one call of C++: after backward all of Python is cold.
// What is unusual or wrong is left to Python, whose rules are not repeated here.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <optional>
#include <utility>

#include "grads.h"
#include "walk.h"

namespace fastclip {

// NaN for what is no number, or too large for one.
inline double as_number(py::handle value) {
  const bool is_number = PyFloat_CheckExact(value.ptr()) || PyLong_CheckExact(value.ptr());
  const double found = is_number ? PyFloat_AsDouble(value.ptr()) : NAN;
  if (PyErr_Occurred() == nullptr) return found;
  PyErr_Clear();
  return NAN;
}

class Threshold {
 public:
  explicit Threshold(py::handle value) : is_exact_(THPVariable_CheckExact(value.ptr())) {
    if (THPVariable_Check(value.ptr())) tensor_ = THPVariable_Unpack(value.ptr());
    if (!tensor_.defined()) number_ = as_number(value);
  }

  // Whether Python need not look: a number >= 0, or a 0-d tensor.
  bool is_usual() const {
    if (!tensor_.defined()) return number_ >= 0;
    return is_exact_ && tensor_.dim() == 0 && tensor_.layout() == at::kStrided &&
           !tensor_.is_meta();
  }

  at::Tensor clip_(const PlainGrads& grads, double p,
                   const std::optional<at::Tensor>& norm = std::nullopt) const {
    return tensor_.defined() ? grads.clip_norm_tensor_(tensor_, p, norm)
                             : grads.clip_norm_(number_, p, norm);
  }

  // As a tensor on the device of `norm`.
  at::Tensor beside(const at::Tensor& norm) const {
    if (tensor_.defined()) return tensor_.to(norm.device());
    return at::full({}, number_, norm.options().dtype(at::kDouble));
  }

 private:
  bool is_exact_;
  at::Tensor tensor_;
  double number_ = NAN;
};

// What `record_` takes besides the numbers: rows, and how many there were.
using Log = std::optional<std::pair<at::Tensor, at::Tensor>>;

// `clip_norm_` of the gradients of a list or tuple of parameters, by a number, a 0-d tensor or a
// rule, of whose answer `checked` makes one of the two; norm and threshold go into the log, if
// there is one. Nothing, and nothing is done, if anything is unusual, or the log is on another
// device.
inline std::optional<at::Tensor> clip_grad_norm(const py::object& parameters,
                                                const py::object& max_norm,
                                                const py::object& norm_type,
                                                const py::object& checked, const Log& log) {
  if (!PyList_CheckExact(parameters.ptr()) && !PyTuple_CheckExact(parameters.ptr()))
    return std::nullopt;
  const double p = as_number(norm_type);
  const bool is_rule = PyCallable_Check(max_norm.ptr()) != 0 && PyType_Check(max_norm.ptr()) == 0;
  const Threshold given(max_norm);
  if (!(p > 0) || !(is_rule || given.is_usual())) return std::nullopt;
  const auto grads = read<What::kGrads>(parameters);
  if (!grads || grads->size() == 0 || (log && !grads->is_on(log->first.device())))
    return std::nullopt;
  Threshold limit = given;
  std::optional<at::Tensor> norm;
  if (is_rule) {
    norm = grads->norm(p);
    const py::object answer = max_norm(*norm);
    limit = Threshold(answer);
    if (!limit.is_usual()) limit = Threshold(checked(answer));
  }
  const at::Tensor total_norm = limit.clip_(*grads, p, norm);
  if (log) PlainGrads::record_(log->first, log->second, total_norm, limit.beside(total_norm));
  return total_norm;
}

}  // namespace fastclip
