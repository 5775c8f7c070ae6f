// The merged weight W + B A of one layer: the one temporary matrix of a merge.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/merge.h>

namespace reslora::detail {

/// Throws c10::ValueError for a weight that cannot take a sum: absent, quantised, sharded, of
/// another shape. `purpose` says who asks.
void check_weight(const at::Tensor& weight, const LayerMerge& layer, const char* purpose);

/// W + B A in fp32 (fp64 for an fp64 weight), on the weight's device.
at::Tensor unchecked_merged_weight(const at::Tensor& weight, const LayerMerge& layer);

/// |matrix|_F, summed in fp64.
double norm_of(const at::Tensor& matrix);

bool is_finite(const at::Tensor& matrix);

}  // namespace reslora::detail
