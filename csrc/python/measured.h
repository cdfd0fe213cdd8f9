// Norms that hooks measure while backward runs. A norm is used only if its gradients are still the
// same tensors at the clip, and unchanged as far as their version counters show.
//
// A piece is the unit that has one norm: a gradient, or a bucket in which DistributedDataParallel
// averages several gradients. Each gradient is in one of three states:
//
//   unseen   its piece has no norm: none was measured yet, or measuring was paused, or the norm was
//            discarded. The clip measures the gradient.
//   touched  (buckets only) backward has added to it; once backward is over, it is seen.
//   seen     its piece was measured. The clip uses the norm of the piece if this gradient and all
//            others of the piece still have the same tensor, memory and version.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <exception>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "grads.h"
#include "unscale.h"

namespace fastclip {

// Holds no reference to a parameter: a parameter holds its hook and so this object, and the GC
// could not find the cycle. Holds none to a gradient: one that is set to None must be freed.
// Methods that take `items` expect the list passed to the constructor.
class [[gnu::visibility("hidden")]] Measured {
 public:
  Measured(const py::list& items, double p)
      : addresses_(items.size()), norms_(items.size()), seen_(items.size()), p_(p) {
    have_unscale_bump_versions();
    for (size_t i = 0; i < items.size(); ++i) {
      addresses_[i] = parameter(items, i).unsafeGetTensorImpl();
      index_.emplace(addresses_[i], i);
    }
  }
  virtual ~Measured() = default;

  bool is_paused = false;

  // Returns all gradients, with known norms: the norms of pieces that have not changed since they
  // were measured, and the norms of all other gradients, measured now. Then discards the norms.
  // Returns nullopt if any gradient is not plain; Python then reads the gradients one by one.
  std::optional<PlainGrads> take(const py::list& items) {
    const size_t count = seen_.size();
    if (items.size() != count) return std::nullopt;
    std::vector<const at::Tensor*> found(count);
    std::vector<bool> is_live(count), is_stale(count);
    for (size_t i = 0; i < count; ++i) {
      // torch.utils.swap_tensors, for one, replaces the TensorImpl of a parameter.
      if (parameter(items, i).unsafeGetTensorImpl() != addresses_[i]) return std::nullopt;
      found[i] = &parameter(items, i).grad();
      if (seen_[i].piece == kNone) continue;
      is_live[seen_[i].piece] = true;
      if (!seen_[i].is_unchanged(*found[i])) is_stale[seen_[i].piece] = true;
    }
    const auto is_known = [&](size_t piece) {
      return piece != kNone && norms_[piece].defined() && is_live[piece] && !is_stale[piece];
    };
    PlainGrads grads, rest;
    grads.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      if (!found[i]->defined()) continue;
      if (!grads.add(*found[i])) return std::nullopt;
      if (!is_known(seen_[i].piece)) rest.add(*found[i]);
    }
    std::vector<at::Tensor> norms;
    for (size_t piece = 0; piece < count; ++piece)
      if (is_known(piece)) norms.push_back(std::move(norms_[piece]));
    for (const at::Tensor& norm : norms) record_current_stream(norm);
    if (rest.size() > 0) norms.push_back(rest.each_norms(p_, false));
    grads.set_known(std::move(norms));
    forget();
    return grads;
  }

  virtual void forget() { std::ranges::fill(norms_, at::Tensor()); }

 protected:
  static constexpr size_t kNone = -1;

  // A gradient at the time when its piece was measured. The storage is compared as well as the
  // tensor: `grad.data = other` and Module.to() replace the storage, but keep the tensor and its
  // version.
  struct Seen {
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> grad;
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    int64_t offset = 0, numel = 0;
    uint32_t version = 0;
    size_t piece = kNone;

    void record(const at::Tensor& now) {
      grad.reset();
      if (!now.defined() || !now.has_storage() || now.is_inference()) return;
      grad.emplace(now.getIntrusivePtr());
      storage.emplace(now.storage().getWeakStorageImpl());
      offset = now.storage_offset();
      numel = now.numel();
      version = now._version();
    }

    // Whether `now` is the recorded gradient, unchanged.
    bool is_unchanged(const at::Tensor& now) const {
      return grad && now.defined() && now.has_storage() &&
             grad->_unsafe_get_target() == now.unsafeGetTensorImpl() &&
             storage->_unsafe_get_target() == now.storage().unsafeGetStorageImpl() &&
             offset == now.storage_offset() && numel == now.numel() && version == now._version();
    }
  };

  static const at::Tensor& parameter(const py::list& items, size_t i) {
    return unpack(PyList_GET_ITEM(items.ptr(), i));
  }

  // kNone if torch.utils.swap_tensors, which keeps hooks, has replaced the parameter's TensorImpl.
  size_t index_of(const at::Tensor& parameter) const {
    const auto found = index_.find(parameter.unsafeGetTensorImpl());
    return found == index_.end() ? kNone : found->second;
  }

  // The norm, one float64; undefined in a pause, and if `grad` is undefined or not plain.
  at::Tensor norm_of(const at::Tensor& grad) const {
    PlainGrads one;
    const bool can = !is_paused && grad.defined() && one.add(grad);
    return can ? one.each_norms(p_, false) : at::Tensor();
  }

 private:
  // If `norm` was allocated on another stream, that stream must not reuse its memory too early.
  static void record_current_stream(const at::Tensor& norm) {
    if (norm.is_cpu()) return;
    const auto device = guard_of(norm);
    device.recordDataPtrOnStream(norm.storage().data_ptr(), device.getStream(norm.device()));
  }

  std::vector<const void*> addresses_;  // of the parameters; only compared
  std::unordered_map<const void*, size_t> index_;

 protected:
  std::vector<at::Tensor> norms_;  // of pieces
  std::vector<Seen> seen_;

 private:
  double p_;
};

// For hooks of single parameters: every gradient is a piece.
class [[gnu::visibility("hidden")]] MeasuredGrads : public Measured {
 public:
  using Measured::Measured;

  // A hook, called when backward has made the gradient of this parameter or added to it.
  void see(const at::Tensor& parameter) {
    const size_t i = index_of(parameter);
    if (i == kNone) return;
    norms_[i] = norm_of(parameter.grad());
    seen_[i].piece = i;
    seen_[i].record(parameter.grad());
  }
};

// For DistributedDataParallel: every bucket is a piece.
class [[gnu::visibility("hidden")]] MeasuredBuckets : public Measured {
 public:
  MeasuredBuckets(const py::list& items, double p)
      : Measured(items, p), is_touched_(items.size()) {}

  // A hook, called when backward has added to the gradient of this parameter, in its bucket.
  void touch(const at::Tensor& parameter) {
    if (const size_t i = index_of(parameter); i != kNone) is_touched_[i] = true;
  }

  // Measures a bucket, which holds the averaged gradients of exactly these parameters.
  void see_bucket(size_t number, const std::vector<at::Tensor>& parameters,
                  const at::Tensor& bucket) {
    if (number >= norms_.size()) return forget();
    try {
      norms_[number] = norm_of(bucket);
    } catch (const std::exception&) {
      // An exception would end backward while other ranks wait. The clip measures instead.
      return forget();
    }
    for (Seen& seen : seen_)
      if (seen.piece == number) seen.piece = kNone;
    for (const at::Tensor& parameter : parameters)
      if (const size_t i = index_of(parameter); i != kNone) seen_[i].piece = number;
  }

  // Called when backward is over: the touched gradients now have the values of their buckets.
  void settle(const py::list& items) {
    if (items.size() != seen_.size()) return forget();
    for (size_t i = 0; i < seen_.size(); ++i) {
      seen_[i].record(is_touched_[i] ? parameter(items, i).grad() : at::Tensor());
      is_touched_[i] = false;
    }
  }

  void forget() override {
    Measured::forget();
    is_touched_.assign(is_touched_.size(), false);
  }

 private:
  std::vector<bool> is_touched_;
};

}  // namespace fastclip
