// Rows that a layer saw, as sums and errors want them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <optional>

namespace reslora::detail {

/// [..., columns] -> [T, columns] of `dtype`, without the rows that `mask` leaves out.
inline at::Tensor as_rows(const at::Tensor& tensor, at::ScalarType dtype,
                          const std::optional<at::Tensor>& mask) {
  const at::Tensor rows = tensor.detach().reshape({-1, tensor.size(-1)}).to(dtype);
  return mask ? rows.index({mask->reshape({-1}).to(rows.device(), at::kBool)}) : rows;
}

/// The sum of squares, in fp64.
inline double square_sum(const at::Tensor& tensor) {
  return tensor.to(at::kDouble).square().sum().item<double>();
}

}  // namespace reslora::detail
