// The merged weight W + B A of one layer: the one temporary matrix of a merge.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/merge.h>

namespace reslora::detail {

/// Throws c10::ValueError, in the name of `op`, unless a layer has a pair A [R, in] and B [out, R],
/// dense and on one device, and a bias [out] or none. One that nobody filled has none.
void check_pair(const LayerMerge& layer, const char* op);

/// Throws c10::ValueError, in the name of `op`, for a pair with NaN or infinity.
void check_finite(const LayerMerge& layer, const char* op);

/// Throws c10::ValueError for a pair that `check_pair` refuses, and for a weight that cannot take a
/// sum: absent, quantised, sharded, of another shape. `purpose` says who asks.
void check_weight(const at::Tensor& weight, const LayerMerge& layer, const char* purpose);

/// c [T, n] += a [T, r] b [r, n], all of c's dtype and device. On the CPU in fp32 an element's bits
/// do not depend on the rows that are computed with it, nor on which of c and c^T is dense.
void add_product_(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b);

/// W + B A in fp32 (fp64 for an fp64 weight), on the weight's device.
at::Tensor unchecked_merged_weight(const at::Tensor& weight, const LayerMerge& layer);

/// |matrix|_F, summed in fp64.
double norm_of(const at::Tensor& matrix);

bool is_finite(const at::Tensor& matrix);

}  // namespace reslora::detail
