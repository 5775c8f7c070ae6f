// Full precision whatever the caller has switched on: no autograd, autocast or TF32.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace reslora::detail {

struct FullPrecision {
  at::NoGradGuard no_grad;
  at::NoTF32Guard no_tf32;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

}  // namespace reslora::detail
