// clip_coef on the CPU: the decision, for one norm or many, without the eight small ops it takes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <type_traits>

#include "phases.h"

namespace fastclip {
namespace {

template <class acc_t>
at::Tensor coefs(const at::Tensor& norms, const at::Tensor& limits, bool wide) {
  at::Tensor result = at::empty_like(norms);
  const int64_t stride = limits.numel() == 1 ? 0 : 1;
  for (int64_t i = 0; i < norms.numel(); ++i)
    result.mutable_data_ptr<acc_t>()[i] =
        clip_coef_as(wide && std::is_same_v<acc_t, double>, norms.const_data_ptr<acc_t>()[i],
                     limits.const_data_ptr<acc_t>()[i * stride]);
  return result;
}

at::Tensor clip_coef_cpu(const at::Tensor& total_norm, double max_norm, bool wide) {
  const auto dtype = total_norm.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble)
    return call_default(find_op<CoefOp>("fastclip::clip_coef"), total_norm, max_norm, wide);
  const at::Tensor norms = total_norm.contiguous();
  const at::Tensor limit = cpu::scalar_result(max_norm, dtype);
  return dtype == at::kDouble ? coefs<double>(norms, limit, wide)
                              : coefs<float>(norms, limit, wide);
}

at::Tensor clip_coef_tensor_cpu(const at::Tensor& total_norm, const at::Tensor& max_norm,
                                bool wide) {
  const auto dtype = total_norm.scalar_type();
  const bool one_each = max_norm.dim() == 0 || max_norm.sizes() == total_norm.sizes();
  if ((dtype != at::kFloat && dtype != at::kDouble) || !one_each || !max_norm.is_cpu())
    return call_default(find_op<CoefTensorOp>("fastclip::clip_coef", "tensor"), total_norm,
                        max_norm, wide);
  const at::Tensor norms = total_norm.contiguous(), limits = max_norm.to(dtype).contiguous();
  return dtype == at::kDouble ? coefs<double>(norms, limits, wide)
                              : coefs<float>(norms, limits, wide);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("clip_coef", clip_coef_cpu);
  m.impl("clip_coef.tensor", clip_coef_tensor_cpu);
}

}  // namespace fastclip
