// record_ on the CPU: a row into a ring, where three small ops cost more than the clip of a few
// tensors.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../tensor_list.h"

namespace fastclip {
namespace {

void record_cpu(const at::Tensor& rows, const at::Tensor& steps, const at::Tensor& row) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.is_contiguous() && rows.size(0) > 0,
                    "rows: expected contiguous rows of numbers, got shape ", rows.sizes());
  TORCH_CHECK_VALUE(steps.scalar_type() == at::kLong && steps.numel() == 1 && steps.is_cpu(),
                    "steps: expected one int64 number on the CPU");
  TORCH_CHECK_VALUE(row.numel() == rows.size(1), "row: expected ", rows.size(1),
                    " numbers, got shape ", row.sizes());
  bump_versions({rows, steps});
  int64_t& count = *steps.mutable_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(count >= 0, "steps: expected a count >= 0, got ", count);
  const int64_t place = count++ % rows.size(0) * row.numel();
  if (rows.scalar_type() == at::kDouble && row.scalar_type() == at::kFloat && row.is_cpu() &&
      row.is_contiguous()) {
    std::copy_n(row.const_data_ptr<float>(), row.numel(), rows.mutable_data_ptr<double>() + place);
  } else {
    const at::Tensor numbers = row.to(rows.options()).contiguous();
    std::memcpy(static_cast<char*>(rows.mutable_data_ptr()) + place * rows.element_size(),
                numbers.const_data_ptr(), numbers.nbytes());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(fastclip, CPU, m) { m.impl("record_", record_cpu); }

}  // namespace fastclip
