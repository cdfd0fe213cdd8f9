// The walk: gradients are read from Python parameters in C++, then every verb is one call of an
// op through the dispatcher, so that profilers and modes see it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <bit>
#include <optional>
#include <vector>

#include "tensor_list.h"

namespace fastclip {

namespace cuda {
// Null in a build without the CUDA kernels.
[[gnu::weak]] std::vector<int> architectures();
[[gnu::weak]] bool serves(int device);
}  // namespace cuda

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

// A set of addresses, as small as one can be: a third of a walk over thousands of parameters would
// go to a general one.
class Seen {
 public:
  explicit Seen(size_t count)
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
std::optional<Grads> read(const py::object& list) {
  constexpr Py_ssize_t kBatch = 16;
  PyObject** items = PySequence_Fast_ITEMS(list.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  Seen seen(what == What::kGrads ? count : 0);
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
      if (!is_plain(*found[i], tensors)) return std::nullopt;
      if (what == What::kTensors || seen.insert(impls[i])) tensors.push_back(*found[i]);
    }
  }
  return Grads(std::move(tensors));
}

}  // namespace
}  // namespace fastclip

PYBIND11_MODULE(_C, m) {
  using fastclip::Grads;
  m.attr("built_for") = fastclip::kBuiltFor;
  m.attr("cuda_architectures") =
      fastclip::cuda::architectures ? fastclip::cuda::architectures() : std::vector<int>();
  m.def("serves_cuda", [](int device) {
    return fastclip::cuda::serves != nullptr && fastclip::cuda::serves(device);
  });
  m.def("read_grads", fastclip::read<fastclip::What::kGrads>);
  m.def("take_tensors", fastclip::read<fastclip::What::kTensors>);
  py::class_<Grads>(m, "Grads")
      .def("__len__", &Grads::size)
      .def("norm", &Grads::norm)
      .def("scale_", &Grads::scale_)
      .def("clamp_", &Grads::clamp_)
      .def("clip_norm_", &Grads::clip_norm_)
      .def("clip_norm_", &Grads::clip_norm_tensor_);
}
