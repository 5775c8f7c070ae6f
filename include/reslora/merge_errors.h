/// @file
/// What merging a layer changes, measured on rows that the layer saw: the method's error and the
/// rounding of the merged weight apart.
///
/// @code{.cpp}
/// auto errors = reslora::layer_errors(plan.layers()[1], x, s, y, {B}, {scaling}, weight);
/// double relative = std::sqrt(errors.method / errors.whole);  // error of the rule alone
/// @endcode
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/export.h>
#include <reslora/merge.h>

#include <optional>
#include <vector>

namespace reslora {

/// Squared Frobenius norms, to be added up over calls.
struct LayerErrors {
  double method = 0;    ///< |B A x + bias - sum of scaling_k B_k s_k|^2: what the rule gives away
  double rounding = 0;  ///< |(cast(W*) - W*) x|^2: what the dtype of the merged weight gives away
  double both = 0;      ///< of their sum
  double whole = 0;     ///< |y|^2
};

/// Compares one call of an unmerged layer with its planned pair, in fp32 (fp64 for fp64 factors).
/// x: [..., in], s: [..., R] (what entered B), y: [..., out]; B, scaling: the blocks that the layer
/// reads; weight: [out, in], undefined where there is none (rounding is 0 then); mask: bool, one
/// element for each row, leaves rows out. Throws
/// c10::ValueError for tensors that do not fit together. Cost: a merged matrix and T in out
/// multiplications.
RESLORA_API LayerErrors layer_errors(const LayerMerge& planned, const at::Tensor& x,
                                     const at::Tensor& s, const at::Tensor& y,
                                     const std::vector<at::Tensor>& B,
                                     const std::vector<double>& scaling, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& mask = std::nullopt);

/// y of the layer as `MergePlan::apply` would leave it: weight and bias merged, cast to their
/// dtype, without changing them. x: [..., in] -> [..., out]. bias may be undefined, but for a layer
/// whose bias an affine fit moves. Throws c10::ValueError as `merged_weight` does, and for an x or
/// bias that does not fit.
RESLORA_API at::Tensor merged_forward(const LayerMerge& planned, const at::Tensor& x,
                                      const at::Tensor& weight, const at::Tensor& bias);

}  // namespace reslora
