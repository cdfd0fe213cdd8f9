// Makes `GradScaler.unscale_` bump gradients' version counters, by which measured.h sees changes.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "../tensor_list.h"

namespace fastclip {

// The op with which `GradScaler.unscale_` divides gradients in place does not bump their versions,
// unlike all other in-place ops (torch 2.13). From the first call of this function on, it does.
inline void have_unscale_bump_versions() {
  static constexpr const char kOp[] = "aten::_amp_foreach_non_finite_check_and_unscale_";
  using Unscale = void(at::TensorList, at::Tensor&, const at::Tensor&);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(kOp, "").typed<Unscale>();
  constexpr auto kKey = c10::DispatchKey::ADInplaceOrView;
  static torch::Library library(torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__);
  static const bool is_done = [] {
    if (!op.hasKernelForDispatchKey(kKey))
      library.impl(kOp, [](at::TensorList grads, at::Tensor& found_inf, const at::Tensor& scale) {
        {
          at::AutoDispatchBelowADInplaceOrView below_autograd;
          op.call(grads, found_inf, scale);
        }
        bump_versions(grads);
      });
    return true;
  }();
  static_cast<void>(is_done);
}

}  // namespace fastclip
