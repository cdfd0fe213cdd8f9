// clip_norm_ on the CPU: measure, decide, scale in one call over one cut of the list.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "phases.h"

namespace fastclip {
namespace {

at::Tensor clip(at::TensorList tensors, const FlatList& list, double max_norm, double p) {
  bump_versions(tensors);
  const cpu::Spans spans(list);
  const double norm = cpu::total_norm(cpu::norm_phase(list, spans, p), p);
  const at::ScalarType dtype = list.result_dtype();
  const double coef =
      dtype == at::kDouble ? clip_coef<double>(norm, max_norm) : clip_coef<float>(norm, max_norm);
  if (coef != 1) cpu::scale_phase(list, spans, [=](size_t) { return coef; });
  return cpu::scalar_result(norm, dtype);
}

at::Tensor clip_norm_cpu(at::TensorList tensors, double max_norm, double p) {
  const auto list = FlatList::look(tensors, p);
  if (!list) return call_default(find_op<ClipNormOp>("fastclip::clip_norm_"), tensors, max_norm, p);
  return clip(tensors, *list, max_norm, p);
}

at::Tensor clip_norm_tensor_cpu(at::TensorList tensors, const at::Tensor& max_norm, double p) {
  check_threshold(max_norm);
  const auto list = FlatList::look(tensors, p);
  if (!list || !max_norm.is_cpu())
    return call_default(find_op<ClipNormTensorOp>("fastclip::clip_norm_", "tensor"), tensors,
                        max_norm, p);
  return clip(tensors, *list, max_norm.to(at::kDouble).const_data_ptr<double>()[0], p);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("clip_norm_", clip_norm_cpu);
  m.impl("clip_norm_.tensor", clip_norm_tensor_cpu);
}

}  // namespace fastclip
