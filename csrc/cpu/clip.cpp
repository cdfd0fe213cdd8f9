// clip_norm_ on the CPU: one call measures the norm, computes the coefficient and scales. If the
// caller passes `norms`, the total norm is the norm of these, and the tensors are not measured.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "phases.h"

namespace fastclip {
namespace {

at::Tensor clip_norm_cpu(at::TensorList tensors, const at::Tensor& max_norm, double p,
                         Norms norms) {
  const auto by_default = [&] {
    return call_default(find_op<ClipNormOp>("fastclip::clip_norm_"), tensors, max_norm, p, norms);
  };
  const auto lists = ClipLists::try_flatten(tensors, norms);
  const bool is_number = max_norm.is_cpu() && max_norm.numel() == 1;
  if (!lists || !has_kernel(p) || !is_number) return by_default();
  const cpu::Spans spans(lists->measured());
  const double norm = cpu::total_norm(lists->measured(), spans, norm_kind(p));
  if (cpu::may_have_overflowed(lists->measured(), norm_kind(p), norm)) return by_default();
  bump_versions(tensors);
  const at::ScalarType dtype = lists->scaled.result_dtype();
  const double coef = clip_coef_as(dtype == at::kDouble, norm, max_norm.item<double>());
  const auto scale = [&](const cpu::Spans& all) {
    cpu::scale_phase(lists->scaled, all, [=](size_t) { return coef; });
  };
  if (coef != 1) lists->known ? scale(cpu::Spans(lists->scaled)) : scale(spans);
  return cpu::scalar_result(norm, dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("clip_norm_", clip_norm_cpu); }

}  // namespace fastclip
