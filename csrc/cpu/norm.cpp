// norm and norms on the CPU: one read of the data.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "phases.h"

namespace fastclip {
namespace {

at::Tensor norm_cpu(at::TensorList tensors, double p, bool wide) {
  const auto by_default = [&] {
    return call_default(find_op<NormOp>("fastclip::norm"), tensors, p, wide);
  };
  const auto list = FlatList::try_flatten(tensors);
  if (!list || !has_kernel(p)) return by_default();
  const double norm = cpu::total_norm(*list, cpu::Spans(*list), norm_kind(p));
  if (cpu::may_have_overflowed(*list, norm_kind(p), norm)) return by_default();
  return cpu::scalar_result(norm, wide ? at::kDouble : list->result_dtype());
}

at::Tensor norms_cpu(at::TensorList tensors, double p, at::OptionalIntArrayRef group, bool wide,
                     bool rows) {
  const auto by_default = [&] {
    return call_default(find_op<NormsOp>("fastclip::norms"), tensors, p, group, wide, rows);
  };
  const auto list = FlatList::try_flatten(tensors, rows);
  const auto groups = list ? count_groups(*list, group) : std::nullopt;
  if (!groups || !has_kernel(p)) return by_default();
  const Norm kind = norm_kind(p);
  const cpu::Spans spans = cpu::Spans::by_group(*list, group);
  const std::vector<double> partials = cpu::norm_phase(*list, spans, kind);
  std::vector<cpu::Accumulator> totals(*groups, cpu::Accumulator(kind));
  for (int64_t k = 0; k < spans.size(); ++k) {
    const size_t i = spans.first_tensor(k);
    totals[group ? (*group)[i] : i].add(partials[k]);
  }
  at::Tensor result = at::empty({*groups}, at::TensorOptions().dtype(at::kDouble));
  double* norms = result.mutable_data_ptr<double>();
  std::ranges::transform(totals, norms, &cpu::Accumulator::norm);
  const auto overflowed = [&](double norm) { return cpu::may_have_overflowed(*list, kind, norm); };
  if (std::any_of(norms, norms + *groups, overflowed)) return by_default();
  return result.to(wide ? at::kDouble : list->result_dtype());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("norm", norm_cpu);
  m.impl("norms", norms_cpu);
}

}  // namespace fastclip
