// The walk: gradients are read from Python parameters in C++, then every verb is one call of an
// op through the dispatcher, so that profilers and modes see it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/flat_hash_map.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <optional>
#include <vector>

#include "tensor_list.h"

namespace fastclip {
namespace {

// Read from the file before it is loaded: another torch's symbols would not resolve.
constexpr const char kBuiltFor[] = "fastclip built for torch " TORCH_VERSION;

// Plain gradients of one device. The ops run below autograd: nothing here is differentiated, and
// the kernels themselves bump the version counters.
class Grads {
 private:
  template <class Op, class... Args>
  auto call(const c10::TypedOperatorHandle<Op>& op, Args&&... args) const {
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(tensors_, std::forward<Args>(args)...);
  }

  std::vector<at::Tensor> tensors_;

 public:
  explicit Grads(std::vector<at::Tensor> tensors) : tensors_(std::move(tensors)) {}

  size_t size() const { return tensors_.size(); }

  at::Tensor norm(double p) const { return call(find_op<NormOp>("fastclip::norm"), p); }

  void scale_(const at::Tensor& coef) const {
    call(find_op<ScaleOp>("fastclip::scale_"), coef, std::nullopt);
  }

  void clamp_(double bound) const { call(find_op<ClampOp>("fastclip::clamp_"), bound); }

  at::Tensor clip_norm_(double max_norm, double p) const {
    return call(find_op<ClipNormOp>("fastclip::clip_norm_"), max_norm, p);
  }

  at::Tensor clip_norm_tensor_(const at::Tensor& max_norm, double p) const {
    return call(find_op<ClipNormTensorOp>("fastclip::clip_norm_", "tensor"), max_norm, p);
  }
};

bool is_plain(const at::Tensor& tensor, const std::vector<at::Tensor>& others) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && is_flat(tensor) &&
         !tensor.is_neg() && (others.empty() || tensor.device() == others[0].device());
}

// The gradients of a list or tuple of parameters, without None and of each parameter once; nothing
// if any of them is not plain and Python has to look. Each step of a batch only follows one pointer
// of every parameter, so that the cache misses of thousands of scattered objects overlap.
std::optional<Grads> read_grads(const py::object& parameters) {
  constexpr Py_ssize_t kBatch = 64;
  PyObject** items = PySequence_Fast_ITEMS(parameters.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(parameters.ptr());
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  ska::flat_hash_set<const c10::TensorImpl*> seen;
  seen.reserve(count);
  for (Py_ssize_t begin = 0; begin < count; begin += kBatch) {
    const Py_ssize_t batch = std::min(kBatch, count - begin);
    c10::TensorImpl* impls[kBatch];
    const at::Tensor* grads[kBatch];
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (begin + i + kBatch < count) prefetch(items[begin + i + kBatch], sizeof(PyObject) + 8);
      if (!THPVariable_CheckExact(items[begin + i])) return std::nullopt;
      impls[i] = THPVariable_Unpack(items[begin + i]).unsafeGetTensorImpl();
    }
    for (Py_ssize_t i = 0; i < batch; ++i) __builtin_prefetch(impls[i]->autograd_meta());
    for (Py_ssize_t i = 0; i < batch; ++i) {
      grads[i] = &impls[i]->grad();
      prefetch(grads[i]->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    }
    for (Py_ssize_t i = 0; i < batch; ++i) {
      if (!grads[i]->defined()) continue;
      if (!is_plain(*grads[i], tensors)) return std::nullopt;
      if (seen.insert(impls[i]).second) tensors.push_back(*grads[i]);
    }
  }
  return Grads(std::move(tensors));
}

// The tensors of a list or tuple themselves, or nothing if any of them is not plain.
std::optional<Grads> take_tensors(const py::object& items) {
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(items.ptr(), i);
    if (!THPVariable_CheckExact(item)) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(item);
    if (!is_plain(tensor, tensors)) return std::nullopt;
    tensors.push_back(tensor);
  }
  return Grads(std::move(tensors));
}

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(_C, m) {
  using fastclip::Grads;
  m.attr("built_for") = fastclip::kBuiltFor;
  m.def("read_grads", fastclip::read_grads);
  m.def("take_tensors", fastclip::take_tensors);
  py::class_<Grads>(m, "Grads")
      .def("__len__", &Grads::size)
      .def("norm", &Grads::norm)
      .def("scale_", &Grads::scale_)
      .def("clamp_", &Grads::clamp_)
      .def("clip_norm_", &Grads::clip_norm_)
      .def("clip_norm_", &Grads::clip_norm_tensor_);
}
