// The rule `projected`: what training's sums of products say of A' = M A_n.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain.h>
#include <reslora/norm_window.h>

namespace reslora::detail {

struct Projection {
  at::Tensor M;         // fp64 [r, r]
  double residual = 0;  // |s - M u|_F / |s|_F over the rows of the sums
};

/// Solves for M in s = M u from the sums of a layer, by least squares that are pulled to c I:
/// M = c I + (S_su - c S_uu) (S_uu + lambda I)^-1, with lambda = 0.3 tr(S_uu) / r and
/// c = |s| / (|u| max(cos(s, u), 1/2)). Throws c10::ValueError without sums, for those of another
/// rank, and for NaN.
Projection solve_projection(const NormWindow& window, const LayerShape& layer);

}  // namespace reslora::detail
