// norm and norms on the CPU: one read of the data, at most 48 KiB of partial results.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "phases.h"

namespace fastclip {
namespace {

at::Tensor norm_cpu(at::TensorList tensors, double p) {
  const auto list = FlatList::look(tensors, p);
  if (!list) return call_default(find_op<NormOp>("fastclip::norm"), tensors, p);
  const cpu::Spans spans(*list);
  return cpu::scalar_result(cpu::total_norm(cpu::norm_phase(*list, spans, p), p),
                            list->result_dtype());
}

at::Tensor norms_cpu(at::TensorList tensors, double p, at::OptionalIntArrayRef group, bool wide,
                     bool rows) {
  const auto list = FlatList::look(tensors, p, unit_of(group, rows));
  if (!list)
    return call_default(find_op<NormsOp>("fastclip::norms"), tensors, p, group, wide, rows);
  const int64_t groups = count_groups(*list, group);
  const cpu::Spans spans = cpu::Spans::by_group(*list, group);
  const std::vector<double> partials = cpu::norm_phase(*list, spans, p);
  std::vector<cpu::Accumulator> totals(groups, cpu::Accumulator(norm_kind(p), p));
  for (int64_t k = 0; k < spans.size(); ++k) {
    const size_t i = spans.first_tensor(k);
    totals[group ? (*group)[i] : i].add(partials[k]);
  }
  at::Tensor result = at::empty({groups}, at::TensorOptions().dtype(at::kDouble));
  double* out = result.mutable_data_ptr<double>();
  for (int64_t g = 0; g < groups; ++g) out[g] = totals[g].norm();
  return result.to(wide ? at::kDouble : list->result_dtype());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("norm", norm_cpu);
  m.impl("norms", norms_cpu);
}

}  // namespace fastclip
