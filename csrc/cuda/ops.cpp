// The host functions of the ops on CUDA. They reach devices, streams and memory through torch's
// device-independent interfaces, so that they compile against any build of torch, CPU-only or not.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../process.h"
#include "../tensor_list.h"
#include "launch.h"

namespace fastclip {
namespace {

// The flattened list; nullopt if the kernels cannot take it or cannot run on its device.
template <class List = FlatList, class... How>
std::optional<List> try_flatten(at::TensorList tensors, How... how) {
  if (tensors.empty() || tensors[0].is_cpu() || cuda::refusal(tensors[0].get_device()))
    return std::nullopt;
  return List::try_flatten(tensors, how...);
}

// The items. If there are several groups, item i is in group[i]; without `group`, in group i.
std::vector<cuda::Item> items_of(const FlatList& list, int64_t groups = 1,
                                 at::OptionalIntArrayRef group = std::nullopt) {
  std::vector<cuda::Item> items(list.size());
  for (int64_t i = 0; i < static_cast<int64_t>(list.size()); ++i)
    items[i] = {list[i], groups == 1 ? 0 : group ? (*group)[i] : i};
  return items;
}

cuda::Numbers numbers_of(const at::Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type() == at::kDouble};
}

// Converts a tensor to one that `numbers_of` accepts: contiguous, float32 or float64.
at::Tensor as_numbers(const at::Tensor& tensor) {
  return tensor.to(tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

cuda::Stream stream_of(const at::Tensor& tensor) {
  return {tensor.get_device(), guard_of(tensor).getStream(tensor.device()).native_handle()};
}

// Allocates memory for `spans` partial results and the norms, calls `launch`, returns the norms.
at::Tensor measure(const at::Tensor& first, int64_t spans, at::IntArrayRef shape,
                   at::ScalarType dtype, cuda::Work work, auto&& launch) {
  const c10::DeviceGuard guard(first.device());
  const at::Tensor partials = at::empty({spans}, first.options().dtype(at::kDouble));
  const at::Tensor norms = at::empty(shape, first.options().dtype(dtype));
  work.norms = numbers_of(norms);
  work.partials = partials.mutable_data_ptr<double>();
  work.spans = static_cast<int>(spans);
  launch(work, stream_of(first));
  return norms;
}

at::Tensor measure_groups(const at::Tensor& first, const cuda::Partition& partition,
                          at::IntArrayRef shape, at::ScalarType dtype, cuda::Work work) {
  const int64_t spans = partition.spans_are_groups(work.groups) ? 0 : partition.spans();
  return measure(first, spans, shape, dtype, work,
                 [&](const auto& all, auto stream) { cuda::launch_norms(partition, all, stream); });
}

at::Tensor norm_cuda(at::TensorList tensors, double p, bool wide) {
  const auto list = try_flatten(tensors);
  if (!list || !has_kernel(p))
    return call_default(find_op<NormOp>("fastclip::norm"), tensors, p, wide);
  return measure_groups(tensors[0], {items_of(*list), false}, {},
                        wide ? at::kDouble : list->result_dtype(), {.kind = norm_kind(p)});
}

at::Tensor norms_cuda(at::TensorList tensors, double p, at::OptionalIntArrayRef group, bool wide,
                      bool rows) {
  const auto list = try_flatten(tensors, rows);
  const auto groups = list ? count_groups(*list, group) : std::nullopt;
  if (!groups || *groups > cuda::kMaxGroups || !has_kernel(p))
    return call_default(find_op<NormsOp>("fastclip::norms"), tensors, p, group, wide, rows);
  auto items = items_of(*list, *groups, group);
  std::ranges::stable_sort(items, {}, &cuda::Item::group);
  return measure_groups(tensors[0], {items, true}, {*groups},
                        wide ? at::kDouble : list->result_dtype(),
                        {.kind = norm_kind(p), .groups = static_cast<int>(*groups)});
}

void scale_cuda(at::TensorList tensors, const at::Tensor& coef, at::OptionalIntArrayRef group,
                bool rows) {
  const auto list = try_flatten(tensors, rows, Access::kWrite);
  const int64_t groups = coef.dim() > 0 ? coef.numel() : 1;
  if (!list || groups > cuda::kMaxGroups || !fits(coef, count_groups(*list, group)))
    return call_default(find_op<ScaleOp>("fastclip::scale_"), tensors, coef, group, rows);
  bump_versions(tensors);
  const c10::DeviceGuard guard(tensors[0].device());
  const at::Tensor values = as_numbers(coef.to(tensors[0].device()));
  const cuda::Work work{.given = numbers_of(values), .groups = static_cast<int>(groups)};
  cuda::launch_change({items_of(*list, groups, group), false}, cuda::Change::kScale, work,
                      stream_of(tensors[0]));
}

void clamp_cuda(at::TensorList tensors, double bound) {
  const auto list = try_flatten(tensors, false, Access::kWrite);
  if (!list) return call_default(find_op<ClampOp>("fastclip::clamp_"), tensors, bound);
  bump_versions(tensors);
  const c10::DeviceGuard guard(tensors[0].device());
  cuda::launch_change({items_of(*list), false}, cuda::Change::kClamp, {.number = bound},
                      stream_of(tensors[0]));
}

at::Tensor clip_norm_cuda(at::TensorList tensors, const at::Tensor& max_norm, double p,
                          Norms norms) {
  const auto lists = try_flatten<ClipLists>(tensors, norms);
  const bool is_near = lists && (max_norm.is_cpu() || max_norm.device() == tensors[0].device());
  if (!is_near || max_norm.numel() != 1 || !has_kernel(p))
    return call_default(find_op<ClipNormOp>("fastclip::clip_norm_"), tensors, max_norm, p, norms);
  const bool may_fuse = !has_process_groups();
  bump_versions(tensors);
  cuda::Work work{.kind = norm_kind(p)};
  at::Tensor limit;
  if (max_norm.is_cpu())
    work.number = max_norm.item<double>();
  else
    work.given = numbers_of(limit = as_numbers(max_norm));
  const cuda::Partition scaled(items_of(lists->scaled), false);
  std::optional<cuda::Partition> known;
  if (lists->known) known.emplace(items_of(*lists->known), false);
  const cuda::Partition& measured = known ? *known : scaled;
  return measure(tensors[0], measured.spans(), {}, lists->scaled.result_dtype(), work,
                 [&](const auto& all, auto stream) {
                   cuda::launch_clip(measured, scaled, may_fuse, all, stream);
                 });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CUDA, m) {
  m.impl("norm", norm_cuda);
  m.impl("norms", norms_cuda);
  m.impl("scale_", scale_cuda);
  m.impl("clamp_", clamp_cuda);
  m.impl("clip_norm_", clip_norm_cuda);
}

}  // namespace fastclip
