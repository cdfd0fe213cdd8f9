// Norms that hooks measure while backward runs. Each counts as long as its gradients are the same
// tensors, unchanged, as far as their version counters tell.
//
// A piece is what is measured in one go: a gradient, or a bucket in which DistributedDataParallel
// averages several. Each gradient is in one of three states:
//
//   unseen   at first, and whenever the norm of its piece is forgotten, or was not measured in a
//            pause: the clip measures it
//   touched  backward has added to it, but its bucket counts only once backward is over (buckets)
//   seen     as it was when its piece was measured: it counts by the norm of that, if at the clip
//            it and all others of the piece are the same tensors, memory and versions
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

// Neither parameters nor gradients are kept: a parameter holds its hook, and so this, and nobody
// would see the cycle; and a gradient that is set to None is to be freed. What takes `items` takes
// the list that this was made with.
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

  // All gradients; what is known of those that are as they were seen goes with them, and the others
  // are measured now. Nothing if any of them is not plain and Python has to look.
  std::optional<PlainGrads> take(const py::list& items) {
    const size_t count = seen_.size();
    if (items.size() != count) return std::nullopt;
    std::vector<const at::Tensor*> found(count);
    std::vector<bool> is_live(count), is_stale(count);
    for (size_t i = 0; i < count; ++i) {
      // A parameter may have been given another tensor, as torch.utils.swap_tensors does.
      if (parameter(items, i).unsafeGetTensorImpl() != addresses_[i]) return std::nullopt;
      found[i] = &parameter(items, i).grad();
      if (seen_[i].piece == kNone) continue;
      is_live[seen_[i].piece] = true;
      if (!seen_[i].is(*found[i])) is_stale[seen_[i].piece] = true;
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
    for (const at::Tensor& norm : norms) keep_for_this_stream(norm);
    if (rest.size() > 0) norms.push_back(rest.each_norms(p_, false));
    grads.know(std::move(norms));
    forget();
    return grads;
  }

  virtual void forget() { std::ranges::fill(norms_, at::Tensor()); }

 protected:
  static constexpr size_t kNone = -1;

  // A gradient as it was when it was measured as a piece, alone or in a bucket. Its memory is told
  // by more than its tensor: `grad.data = other` and Module.to() keep that, and its version.
  struct Seen {
    std::optional<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> grad;
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> storage;
    int64_t offset = 0, numel = 0;
    uint32_t version = 0;
    size_t piece = kNone;

    void look(const at::Tensor& now) {
      grad.reset();
      if (!now.defined() || !now.has_storage() || now.is_inference()) return;
      grad.emplace(now.getIntrusivePtr());
      storage.emplace(now.storage().getWeakStorageImpl());
      offset = now.storage_offset();
      numel = now.numel();
      version = now._version();
    }

    // Whether `now` is this very gradient, and unchanged.
    bool is(const at::Tensor& now) const {
      return grad && now.defined() && now.has_storage() &&
             grad->_unsafe_get_target() == now.unsafeGetTensorImpl() &&
             storage->_unsafe_get_target() == now.storage().unsafeGetStorageImpl() &&
             offset == now.storage_offset() && numel == now.numel() && version == now._version();
    }
  };

  static const at::Tensor& parameter(const py::list& items, size_t i) {
    return unpack(PyList_GET_ITEM(items.ptr(), i));
  }

  // kNone if it is another tensor now: hooks go with parameters, also where those are swapped.
  size_t index_of(const at::Tensor& parameter) const {
    const auto found = index_.find(parameter.unsafeGetTensorImpl());
    return found == index_.end() ? kNone : found->second;
  }

  // A float64 of one element; undefined if there is nothing to measure, or Python has to.
  at::Tensor norm_of(const at::Tensor& grad) const {
    PlainGrads one;
    const bool can = !is_paused && grad.defined() && one.add(grad);
    return can ? one.each_norms(p_, false) : at::Tensor();
  }

 private:
  // Backward may have run on another stream, which must not have this memory back before its time.
  static void keep_for_this_stream(const at::Tensor& norm) {
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

// Every gradient is a piece.
class [[gnu::visibility("hidden")]] MeasuredGrads : public Measured {
 public:
  using Measured::Measured;

  // A hook: backward has made, or added to, the gradient of this parameter.
  void see(const at::Tensor& parameter) {
    const size_t i = index_of(parameter);
    if (i == kNone) return;
    norms_[i] = norm_of(parameter.grad());
    seen_[i].piece = i;
    seen_[i].look(parameter.grad());
  }
};

// Pieces are buckets.
class [[gnu::visibility("hidden")]] MeasuredBuckets : public Measured {
 public:
  MeasuredBuckets(const py::list& items, double p)
      : Measured(items, p), is_touched_(items.size()) {}

  // A hook: backward has added to the gradient of this parameter, in its bucket.
  void touch(const at::Tensor& parameter) {
    if (const size_t i = index_of(parameter); i != kNone) is_touched_[i] = true;
  }

  // The averaged gradients of these parameters, and of no others, are in this bucket.
  void see_bucket(size_t number, const std::vector<at::Tensor>& parameters,
                  const at::Tensor& bucket) {
    if (number >= norms_.size()) return forget();
    try {
      norms_[number] = norm_of(bucket);
    } catch (const std::exception&) {
      // Thrown here it would end backward, while other ranks wait. The clip measures again.
      return forget();
    }
    for (Seen& seen : seen_)
      if (seen.piece == number) seen.piece = kNone;
    for (const at::Tensor& parameter : parameters)
      if (const size_t i = index_of(parameter); i != kNone) seen_[i].piece = number;
  }

  // Backward is over: what it touched is now as its bucket was when that was measured.
  void settle(const py::list& items) {
    if (items.size() != seen_.size()) return forget();
    for (size_t i = 0; i < seen_.size(); ++i) {
      seen_[i].look(is_touched_[i] ? parameter(items, i).grad() : at::Tensor());
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
