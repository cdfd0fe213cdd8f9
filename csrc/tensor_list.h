// What the host functions of all devices share: whether the kernels can take a tensor list as flat
// memory, the dtype of the result, the types of the ops, and the version counters. A host function
// calls `try_flatten` first. A list or an argument that it cannot take goes to the default op: the
// same op in plain PyTorch, which also raises the errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "formulas.h"

namespace fastclip {

inline std::optional<Dtype> kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kDouble:
      return Dtype::kDouble;
    default:
      return std::nullopt;
  }
}

// Whether the elements of `tensor` fill numel() consecutive places in memory, in any order.
inline bool is_flat(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && kernel_dtype(tensor.scalar_type()) &&
         tensor.is_non_overlapping_and_dense();
}

// Note [prefetch]: thousands of tensors are thousands of objects scattered in memory, which the
// hardware prefetcher cannot predict. Loops over tensors prefetch the tensor kAhead places ahead.
constexpr size_t kAhead = 16;

inline void prefetch(const void* begin, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64)
    __builtin_prefetch(static_cast<const char*>(begin) + line);
}

// Gives access to the current stream of a tensor's device, whatever type of device it is.
inline c10::impl::VirtualGuardImpl guard_of(const at::Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type());
}

// Whether a list is to be written. Copy-on-write storage stays shared if tensors are only read.
enum class Access { kRead, kWrite };

// Whether the kernels are in use; if not, every list goes to the default ops. Set by
// `fastclip.use_kernels`.
inline std::atomic<bool> kernels_are_on{true};

// A list that the kernels can take: flat tensors of one device, or their rows. Each TensorImpl is
// read only once, because it is larger than the data of a small tensor.
class FlatList {
 public:
  // The items are the tensors; with `rows`, a tensor of two or more dimensions is replaced by its
  // slices along the first. Returns nullopt if the kernels are off, or if any tensor is not flat or
  // not on the device of the first; the list then goes to the default op.
  static std::optional<FlatList> try_flatten(at::TensorList tensors, bool rows = false,
                                             Access access = Access::kRead) {
    if (!kernels_are_on) return std::nullopt;
    FlatList list(rows);
    list.items_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i + 2 * kAhead < tensors.size())
        prefetch(tensors[i + 2 * kAhead].unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      if (i + kAhead < tensors.size())
        prefetch(storage_of(tensors[i + kAhead]), sizeof(c10::StorageImpl));
      const at::Tensor& t = tensors[i];
      if (!is_flat(t) || t.device() != tensors[0].device()) return std::nullopt;
      const void* data = access == Access::kRead ? t.const_data_ptr() : t.mutable_data_ptr();
      if (!list.add(t, static_cast<const char*>(data))) return std::nullopt;
      list.elements_ += t.numel();
      list.wide_ |= t.scalar_type() == at::kDouble;
    }
    return list;
  }

  size_t size() const { return items_.size(); }
  bool has_rows() const { return rows_; }
  const Flat& operator[](size_t i) const { return items_[i]; }
  int64_t elements() const { return elements_; }

  // float64 if any tensor is float64, else float32.
  at::ScalarType result_dtype() const { return wide_ ? at::kDouble : at::kFloat; }

 private:
  explicit FlatList(bool rows) : rows_(rows) {}

  int64_t count_items(const at::Tensor& t) const { return rows_ && t.dim() > 1 ? t.size(0) : 1; }

  // Adds the tensor, or its rows. Returns false if the rows are not contiguous.
  bool add(const at::Tensor& t, const char* data) {
    Flat flat{const_cast<char*>(data), t.numel(), *kernel_dtype(t.scalar_type())};
    const int64_t count = count_items(t);
    if (count != 1) {
      flat.numel /= std::max<int64_t>(1, count);
      if (flat.numel > 0 && t.stride(0) != flat.numel) return false;
    }
    for (int64_t i = 0; i < count; ++i) {
      items_.push_back(flat);
      flat.data += flat.numel * flat.element_size();
    }
    return true;
  }

  static const c10::StorageImpl* storage_of(const at::Tensor& t) {
    return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  bool rows_;
  std::vector<Flat> items_;
  int64_t elements_ = 0;
  bool wide_ = false;
};

// The tensors that `clip_norm_` scales, and what it measures: the same tensors, or else `known`,
// norms that were measured before and whose norm is the total norm.
struct ClipLists {
  FlatList scaled;
  std::optional<FlatList> known;

  static std::optional<ClipLists> try_flatten(at::TensorList tensors,
                                              std::optional<at::TensorList> norms) {
    auto scaled = FlatList::try_flatten(tensors, false, Access::kWrite);
    auto known = norms ? FlatList::try_flatten(*norms) : std::nullopt;
    if (!scaled || known.has_value() != norms.has_value()) return std::nullopt;
    const bool both = norms && !norms->empty() && !tensors.empty();
    if (both && norms->front().device() != tensors[0].device()) return std::nullopt;
    return ClipLists{std::move(*scaled), std::move(known)};
  }

  const FlatList& measured() const { return known ? *known : scaled; }
};

// The C++ types of the ops, as their schemas define them.
using NormOp = at::Tensor(at::TensorList, double, bool);
using NormsOp = at::Tensor(at::TensorList, double, at::OptionalIntArrayRef, bool, bool);
using ScaleOp = void(at::TensorList, const at::Tensor&, at::OptionalIntArrayRef, bool);
using ClampOp = void(at::TensorList, double);
using Norms = std::optional<at::TensorList>;
using ClipNormOp = at::Tensor(at::TensorList, const at::Tensor&, double, Norms);

template <class Op>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

// Calls the plain-PyTorch default of an op from inside a kernel of the same op: with an empty key
// set the dispatcher selects the default, whichever devices have kernels.
template <class Op, class... Args>
auto call_default(const c10::TypedOperatorHandle<Op>& op, Args&&... args) {
  return op.redispatch(c10::DispatchKeySet(), std::forward<Args>(args)...);
}

// The number of groups in a call of `norms` or `scale_`; without `group` each item is a group.
// Returns nullopt if `group` does not fit the list: the default op then raises the error.
inline std::optional<int64_t> count_groups(const FlatList& list, at::OptionalIntArrayRef group) {
  const auto count = static_cast<int64_t>(list.size());
  if (!group) return count;
  const bool fits = !list.has_rows() && static_cast<int64_t>(group->size()) == count &&
                    std::ranges::all_of(*group, [](int64_t g) { return g >= 0; });
  if (!fits) return std::nullopt;
  return count == 0 ? 0 : std::ranges::max(*group) + 1;
}

// Whether `coef` is one number or has one for each group; if not, the default op raises the error.
inline bool fits(const at::Tensor& coef, std::optional<int64_t> groups) {
  return groups && (coef.dim() == 0 || (coef.dim() == 1 && coef.numel() >= *groups));
}

// The in-place ops bump the version counters of all their tensors, even if nothing is written. The
// counters of a batch are read before the first is bumped: the cache misses of plain loads overlap,
// but those of atomic increments would come one by one.
inline void bump_versions(at::TensorList tensors) {
  constexpr size_t kBatch = 64;
  for (; !tensors.empty(); tensors = tensors.slice(std::min(kBatch, tensors.size()))) {
    const at::TensorList batch = tensors.slice(0, std::min(kBatch, tensors.size()));
    for (const at::Tensor& t : batch) {
      const c10::VariableVersion& version = t.unsafeGetTensorImpl()->version_counter();
      if (version.enabled()) static_cast<void>(version.current_version());
    }
    for (const at::Tensor& t : batch) t.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace fastclip
