// Norms that hooks measure while backward runs. Each counts as long as its gradients are the same
// tensors, unchanged, as far as their version counters tell.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "grads.h"

namespace fastclip {

// Neither parameters nor gradients are kept: a parameter holds its hook, and so this, and nobody
// would see the cycle; and a gradient that is set to None is to be freed. What takes `items` takes
// the list that this was made with.
class [[gnu::visibility("hidden")]] Measured {
 public:
  Measured(const py::list& items, double p)
      : p_(p), addresses_(items.size()), parts_(items.size()), seen_(items.size()) {
    for (size_t i = 0; i < items.size(); ++i) {
      addresses_[i] = parameter(items, i).unsafeGetTensorImpl();
      index_.emplace(addresses_[i], i);
    }
  }

  bool is_paused = false;

  // A hook: backward has made, or added to, the gradient of this parameter.
  void see(const at::Tensor& parameter) {
    const size_t i = index_.at(parameter.unsafeGetTensorImpl());
    measure(i, {i}, parameter.grad());
    look(i, parameter.grad());
  }

  // A hook: as `see`, where what is measured is the bucket in which the gradient is averaged.
  void touch(const at::Tensor& parameter) {
    touched_.push_back(index_.at(parameter.unsafeGetTensorImpl()));
  }

  // The averaged gradients of some parameters are the elements of `bucket`.
  void see_bucket(size_t number, const std::vector<at::Tensor>& parameters,
                  const at::Tensor& bucket) {
    std::vector<size_t> members;
    for (const at::Tensor& parameter : parameters)
      members.push_back(index_.at(parameter.unsafeGetTensorImpl()));
    measure(number, std::move(members), bucket);
  }

  // Backward is over: what it touched is now as its bucket was when that was measured.
  void settle(const py::list& items) {
    for (Seen& seen : seen_) seen.grad.reset();
    for (const size_t i : touched_) look(i, parameter(items, i).grad());
    touched_.clear();
  }

  // All gradients, those known that are as they were seen, and the others measured now; nothing if
  // any of them is not plain and Python has to look.
  std::optional<Grads> read(const py::list& items) const {
    const size_t count = seen_.size();
    std::vector<const at::Tensor*> found(count);
    for (size_t i = 0; i < count; ++i) {
      // A parameter may have been given another tensor, as torch.utils.swap_tensors does.
      if (parameter(items, i).unsafeGetTensorImpl() != addresses_[i]) return std::nullopt;
      found[i] = &parameter(items, i).grad();
    }
    Grads grads, rest;
    grads.reserve(count);
    std::vector<at::Tensor> norms;
    std::vector<bool> is_known(count);
    for (size_t number = 0; number < parts_.size(); ++number) {
      const auto& [norm, members] = parts_[number];
      const auto is_as_seen = [&](size_t i) { return seen_[i].is(*found[i], number); };
      if (!norm.defined() || !std::ranges::all_of(members, is_as_seen)) continue;
      norms.push_back(norm);
      for (const size_t i : members) is_known[i] = true;
    }
    for (size_t i = 0; i < count; ++i) {
      if (!found[i]->defined()) continue;
      if (!grads.add(*found[i])) return std::nullopt;
      if (!is_known[i]) rest.add(*found[i]);
    }
    if (rest.size() > 0) norms.push_back(rest.each_norms(p_, false, true));
    grads.know(std::move(norms));
    return grads;
  }

  // The common case of a clip, in one call of C++: after backward all of Python is cold. Nothing if
  // Python has to look, at the threshold or at a gradient; then nothing is done.
  std::optional<at::Tensor> clip_(const py::list& items, py::handle max_norm) {
    const bool is_number = PyFloat_Check(max_norm.ptr()) && PyFloat_AS_DOUBLE(max_norm.ptr()) >= 0;
    const auto grads = is_number ? read(items) : std::nullopt;
    if (!grads) return std::nullopt;
    const at::Tensor total_norm = grads->clip_norm_(PyFloat_AS_DOUBLE(max_norm.ptr()), p_);
    forget();
    return total_norm;
  }

  void forget() {
    std::ranges::fill(parts_, Part{});
    touched_.clear();
  }

 private:
  // The norm of the gradients of some parameters together, as a float64 of one element.
  struct Part {
    at::Tensor norm;
    std::vector<size_t> members;
  };

  // A gradient as it was when it counted to a part.
  struct Seen {
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> grad;
    uint32_t version = 0;
    size_t part = 0;

    // Whether `now` is this very gradient, unchanged since, and counts to that part.
    bool is(const at::Tensor& now, size_t number) const {
      return grad && now.defined() && part == number &&
             grad->_unsafe_get_target() == now.unsafeGetTensorImpl() && version == now._version();
    }
  };

  static const at::Tensor& parameter(const py::list& items, size_t i) {
    return THPVariable_Unpack(PyList_GET_ITEM(items.ptr(), i));
  }

  void measure(size_t number, std::vector<size_t> members, const at::Tensor& grad) {
    Grads one;
    const bool can = !is_paused && grad.defined() && one.add(grad);
    const at::Tensor norm = can ? one.each_norms(p_, false, true) : at::Tensor();
    for (const size_t i : members) seen_[i].part = number;
    parts_.at(number) = {norm, std::move(members)};
  }

  void look(size_t i, const at::Tensor& grad) {
    if (!grad.defined() || grad.is_inference()) return seen_[i].grad.reset();
    seen_[i].grad.emplace(grad.getIntrusivePtr());
    seen_[i].version = grad._version();
  }

  double p_;
  std::vector<const void*> addresses_;  // of the parameters; only compared
  std::unordered_map<const void*, size_t> index_;
  std::vector<Part> parts_;
  std::vector<Seen> seen_;
  std::vector<size_t> touched_;
};

}  // namespace fastclip
