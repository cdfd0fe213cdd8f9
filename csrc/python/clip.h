// `clip_grad_norm_` as it is called most, in one call of C++: after backward all of Python is cold.
// What is unusual or wrong is left to Python, whose rules are not repeated here.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

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

// Whether Python need not look at a threshold: it is a number >= 0, or a 0-d tensor.
inline bool is_usual(py::handle max_norm) {
  if (!is_tensor(max_norm)) return as_number(max_norm) >= 0;
  const at::Tensor& tensor = unpack(max_norm);
  return is_exact_tensor(max_norm) && tensor.dim() == 0 && tensor.layout() == at::kStrided &&
         !tensor.is_meta();
}

// A threshold as a tensor: itself, or on the CPU.
inline at::Tensor as_limit(py::handle max_norm) {
  if (is_tensor(max_norm)) return unpack(max_norm);
  return at::scalar_tensor(max_norm.cast<double>(), at::kDouble);
}

// A threshold on the device of `norm`; a copy from the CPU would wait for that.
inline at::Tensor beside(const at::Tensor& norm, const at::Tensor& limit) {
  if (!limit.is_cpu()) return limit.to(norm.device());
  return at::full({}, limit.item<double>(), norm.options().dtype(at::kDouble));
}

inline at::Tensor clip_norm(const PlainGrads& grads, py::handle max_norm, double p,
                            const std::optional<at::Tensor>& norm) {
  return grads.clip_norm_(as_limit(max_norm), p, norm);
}

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
  if (!(p > 0) || !(is_rule || is_usual(max_norm))) return std::nullopt;
  const auto grads = read<What::kGrads>(parameters);
  if (!grads || grads->size() == 0 || (log && !grads->is_on(log->first.device())))
    return std::nullopt;
  py::object answer = max_norm;
  std::optional<at::Tensor> norm;
  if (is_rule) {
    norm = grads->norm(p);
    answer = max_norm(*norm);
    if (!is_usual(answer)) answer = checked(answer);
  }
  const at::Tensor limit = as_limit(answer);
  const at::Tensor total_norm = grads->clip_norm_(limit, p, norm);
  if (log) PlainGrads::record_(log->first, log->second, total_norm, beside(total_norm, limit));
  return total_norm;
}

}  // namespace fastclip
