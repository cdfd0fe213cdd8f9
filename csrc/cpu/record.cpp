// record_ on the CPU: norms and thresholds into a ring, where three small ops cost more than the
// clip of a few tensors.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../tensor_list.h"

namespace fastclip {
namespace {

// As numbers of `rows`, whose memory is `to`.
void copy(const at::Tensor& from, const at::Tensor& rows, char* to) {
  if (rows.scalar_type() == at::kDouble && from.scalar_type() == at::kFloat && from.is_cpu() &&
      from.is_contiguous()) {
    std::copy_n(from.const_data_ptr<float>(), from.numel(), reinterpret_cast<double*>(to));
  } else {
    const at::Tensor numbers = from.to(rows.options()).contiguous();
    std::memcpy(to, numbers.const_data_ptr(), numbers.nbytes());
  }
}

void record_cpu(const at::Tensor& rows, const at::Tensor& steps, const at::Tensor& norms,
                const at::Tensor& limits) {
  const bool are_rows = rows.dim() == 2 && rows.is_contiguous() && rows.size(0) > 0 &&
                        norms.numel() + limits.numel() == rows.size(1);
  const bool is_count = steps.scalar_type() == at::kLong && steps.numel() == 1 && steps.is_cpu() &&
                        *steps.const_data_ptr<int64_t>() >= 0;
  if (!kernels_are_on || !are_rows || !is_count)
    return call_default(find_op<RecordOp>("fastclip::record_"), rows, steps, norms, limits);
  bump_versions({rows, steps});
  int64_t& count = *steps.mutable_data_ptr<int64_t>();
  const auto size = static_cast<int64_t>(rows.element_size());
  char* row =
      static_cast<char*>(rows.mutable_data_ptr()) + count++ % rows.size(0) * rows.size(1) * size;
  copy(norms, rows, row);
  copy(limits, rows, row + norms.numel() * size);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("record_", record_cpu); }

}  // namespace fastclip
