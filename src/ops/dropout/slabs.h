// The small products of `adapt` with dropout, for the CPU and types other than fp32: a few rows of
// x at a time are masked into a buffer that stays in cache, so that no dropped copy of x is made.
//
// x [T, in] and dx [T, in] are masked by bits [T, ceil(in/8)]; see dropout/bit_lanes.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace reslora::ops {

/// out [T, R] = alpha * kept x A^T.
void project_slabs(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& A, double alpha,
                   at::Tensor& out);

/// Returns [R, in] = alpha * du^T kept x.
at::Tensor project_grad_slabs(const at::Tensor& du, const at::Tensor& x, const at::Tensor& bits,
                              double alpha);

/// dx [T, in] = kept (alpha * du A).
void expand_slabs(const at::Tensor& du, const at::Tensor& A, const at::Tensor& bits, double alpha,
                  at::Tensor& dx);

}  // namespace reslora::ops
