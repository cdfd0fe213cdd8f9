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
  const auto list = FlatList::look(tensors, p);
  if (!list) return call_default(find_op<NormOp>("fastclip::norm"), tensors, p, wide);
  const cpu::Spans spans(*list);
  return cpu::scalar_result(cpu::total_norm(*list, spans, p),
                            wide ? at::kDouble : list->result_dtype());
}

at::Tensor norms_cpu(at::TensorList tensors, double p, at::OptionalIntArrayRef group, bool wide,
                     bool rows) {
  const auto list = FlatList::look(tensors, p, unit_of(group, rows));
  if (!list)
    return call_default(find_op<NormsOp>("fastclip::norms"), tensors, p, group, wide, rows);
  const int64_t groups = count_groups(*list, group);
  const cpu::Spans spans = cpu::Spans::by_group(*list, group);
  const auto measure = [&](Norm kind) {
    const std::vector<double> partials = cpu::norm_phase(*list, spans, kind, p);
    std::vector<cpu::Accumulator> totals(groups, cpu::Accumulator(kind, p));
    for (int64_t k = 0; k < spans.size(); ++k) {
      const size_t i = spans.first_tensor(k);
      totals[group ? (*group)[i] : i].add(partials[k]);
    }
    std::vector<double> norms(groups);
    std::ranges::transform(totals, norms.begin(), &cpu::Accumulator::norm);
    return norms;
  };
  const std::vector<double> norms = cpu::without_overflow(*list, p, measure);
  at::Tensor result = at::empty({groups}, at::TensorOptions().dtype(at::kDouble));
  std::ranges::copy(norms, result.mutable_data_ptr<double>());
  return result.to(wide ? at::kDouble : list->result_dtype());
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("norm", norm_cpu);
  m.impl("norms", norms_cpu);
}

}  // namespace fastclip
