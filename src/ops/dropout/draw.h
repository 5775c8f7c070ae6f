// Dropout bits for a matrix on the CPU, from torch's default generator.
#pragma once

#include <ATen/core/Tensor.h>

namespace reslora::ops {

/// Returns bits uint8 [T, ceil(in/8)] for x [T, in], each 1 with probability `keep`. Takes one
/// number from the default generator.
at::Tensor draw_bits(const at::Tensor& x, double keep);

}  // namespace reslora::ops
