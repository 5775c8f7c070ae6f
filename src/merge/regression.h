// The iterative solve of a fit whose rows lie in a file.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/regression.h>

#include <string>

#include "merge/row_file.h"

namespace reslora::detail {

/// What is summed beside the rows, fp64.
struct RowSums {
  at::Tensor vx;        // [r, in], sum v x^T
  at::Tensor ux;        // [r, in], sum A x x^T
  at::Tensor diagonal;  // [in], of sum x x^T
  double vv = 0;
  int64_t rows = 0;
};

/// The linear fit by conjugate gradients, each step one read of the file (GEMMs in fp32, the rest
/// in fp64); `steps` is set to their number.
Fit solve_rows(const RowSums& sums, RowFile& rows, const at::Tensor& A, double ridge,
               const std::string& name, const FitAnchor& anchor, int64_t& steps);

}  // namespace reslora::detail
