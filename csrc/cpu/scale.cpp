// scale_ and clamp_ on the CPU: in place, writing only what changes.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "phases.h"

namespace fastclip {
namespace {

void scale_cpu(at::TensorList tensors, const at::Tensor& coef, at::OptionalIntArrayRef group,
               bool rows) {
  const auto list = FlatList::try_flatten(tensors, rows, Access::kWrite);
  if (!list || !coef.is_cpu() || !fits(coef, count_groups(*list, group)))
    return call_default(find_op<ScaleOp>("fastclip::scale_"), tensors, coef, group, rows);
  bump_versions(tensors);
  const at::Tensor values = coef.to(at::kDouble).contiguous();
  const double* c = values.const_data_ptr<double>();
  const bool single = coef.dim() == 0;
  const auto coef_of = [&](size_t i) { return c[single ? 0 : group ? (*group)[i] : i]; };
  cpu::scale_phase(*list, cpu::Spans(*list), coef_of);
}

void clamp_cpu(at::TensorList tensors, double bound) {
  const auto list = FlatList::try_flatten(tensors, false, Access::kWrite);
  if (!list) return call_default(find_op<ClampOp>("fastclip::clamp_"), tensors, bound);
  bump_versions(tensors);
  const cpu::Spans spans(*list);
  spans.parallel([&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k)
      spans.for_each_tile(k, [&](size_t i, void* data, int64_t n) {
        cpu::clamp(data, (*list)[i].dtype, n, bound);
      });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) {
  m.impl("scale_", scale_cpu);
  m.impl("clamp_", clamp_cpu);
}

}  // namespace fastclip
