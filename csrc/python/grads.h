// Local gradients and the methods that Python calls on them. Each method is one op call through the
// dispatcher, so that profilers and dispatch modes see it.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../tensor_list.h"
#include "tensors.h"

namespace fastclip {

// Whether `tensor` is plain: the kernels can take it, it has neither Python dispatch nor lazily
// flipped signs, and it is on the device of `others`.
inline bool is_plain(const at::Tensor& tensor, const std::vector<at::Tensor>& others) {
  return !tensor.unsafeGetTensorImpl()->is_python_dispatch() && is_flat(tensor) &&
         !tensor.is_neg() && (others.empty() || tensor.device() == others[0].device());
}

// Plain gradients of one device, or the plain tensors inside gradients that are wrappers, such as
// DTensors. The ops run below autograd, so nothing here is differentiated. The ops bump the version
// counters of the plain tensors, but not those of the wrappers.
class PlainGrads {
 private:
  // The methods keep their op handles in statics: a lookup takes a lock and misses the caches.
  template <class Op, class... Args>
  static auto call(const c10::TypedOperatorHandle<Op>& op, Args&&... args) {
    py::gil_scoped_release release;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(std::forward<Args>(args)...);
  }

  std::vector<at::Tensor> tensors_, wrappers_;
  std::vector<int64_t> groups_;
  std::optional<std::vector<at::Tensor>> known_;
  // Bit i is set if any tensor has ScalarType i.
  uint64_t dtypes_ = 0;

 public:
  void reserve(size_t count) { tensors_.reserve(count); }

  // Adds `tensor`, or returns false if it is not plain or not on the device of the others.
  bool add(const at::Tensor& tensor) {
    if (!is_plain(tensor, tensors_)) return false;
    tensors_.push_back(tensor);
    dtypes_ |= uint64_t{1} << static_cast<unsigned>(tensor.scalar_type());
    return true;
  }

  void add_wrapper(const at::Tensor& wrapper) { wrappers_.push_back(wrapper); }
  void add_group(int64_t group) { groups_.push_back(group); }

  // Sets norms that were measured before, each a tensor of one element. The norm of these norms is
  // that of all tensors.
  void set_known(std::vector<at::Tensor> norms) { known_ = std::move(norms); }

  size_t size() const { return tensors_.size(); }

  bool is_wide() const { return has(at::kDouble); }

  bool has(at::ScalarType dtype) const { return dtypes_ >> static_cast<unsigned>(dtype) & 1; }

  std::vector<at::Device> devices() const {
    if (tensors_.empty()) return {};
    return {tensors_[0].device()};
  }

  // Converts float64 norms to `dtype`, by default float64 if any gradient is, else float32.
  at::Tensor result(const at::Tensor& norms, std::optional<at::ScalarType> dtype) const {
    return norms.to(dtype.value_or(is_wide() ? at::kDouble : at::kFloat));
  }

  at::Tensor norm(double p) const {
    static const auto op = find_op<NormOp>("fastclip::norm");
    return call(op, known_ ? *known_ : tensors_, p, true);
  }

  // The group of each gradient, which is 0 for all if no group was added.
  std::vector<int64_t> groups() const {
    return groups_.empty() ? std::vector<int64_t>(tensors_.size()) : groups_;
  }

  // The norm of each group, up to the last group that holds a gradient.
  at::Tensor norms(double p) const {
    static const auto op = find_op<NormsOp>("fastclip::norms");
    const std::vector<int64_t> of = groups();
    return call(op, tensors_, p, at::OptionalIntArrayRef(of), true, false);
  }

  // The norm of each gradient, or of each row.
  at::Tensor each_norms(double p, bool rows) const {
    static const auto op = find_op<NormsOp>("fastclip::norms");
    return call(op, tensors_, p, std::nullopt, true, rows);
  }

  // Multiplies by one coefficient, or by one for each group.
  void scale_(const at::Tensor& coef) const {
    static const auto op = find_op<ScaleOp>("fastclip::scale_");
    const std::vector<int64_t> of = coef.dim() ? groups() : std::vector<int64_t>();
    call(op, tensors_, coef, coef.dim() ? at::OptionalIntArrayRef(of) : std::nullopt, false);
    bump_versions(wrappers_);
  }

  // Multiplies by one coefficient for each gradient, or for each row.
  void scale_each_(const at::Tensor& coefs, bool rows) const {
    static const auto op = find_op<ScaleOp>("fastclip::scale_");
    call(op, tensors_, coefs, std::nullopt, rows);
    bump_versions(wrappers_);
  }

  void clamp_(double bound) const {
    static const auto op = find_op<ClampOp>("fastclip::clamp_");
    call(op, tensors_, bound);
    bump_versions(wrappers_);
  }

  // Clips by the norm, which is measured unless it is given or known.
  at::Tensor clip_norm_(const at::Tensor& max_norm, double p,
                        const std::optional<at::Tensor>& norm) const {
    static const auto op = find_op<ClipNormOp>("fastclip::clip_norm_");
    const Norms norms = norm ? Norms(*norm) : known_ ? Norms(*known_) : std::nullopt;
    // With order infinity the op takes a given norm as it is.
    at::Tensor total_norm = call(op, tensors_, max_norm, norm ? INFINITY : p, norms);
    bump_versions(wrappers_);
    return total_norm;
  }
};

}  // namespace fastclip
