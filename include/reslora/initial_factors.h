/// @file
/// What A and B hold before training.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/config.h>
#include <reslora/export.h>

namespace reslora {

/// Fills A [r, in] and B [out, r] in place as `init_lora_weights` says: true: A Kaiming-uniform
/// (uniform within 1 / sqrt(in)), B zero; "gaussian": A normal with deviation 1 / r, B zero;
/// false: B Kaiming-uniform too (within 1 / sqrt(r)). Numbers come from torch's generator of the
/// tensors' device, A's before B's. Nothing is recorded for gradients. Throws c10::ValueError for
/// tensors of other shapes or no floating dtype, and for another text; on meta nothing is filled.
RESLORA_API void fill_factors(const at::Tensor& A, const at::Tensor& B, const InitLoraWeights& how);

}  // namespace reslora
