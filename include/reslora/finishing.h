/// @file
/// The finish of a training: every layer of a chain becomes a plain LoRA, which trains on.
///
/// What a layer computes changes by the residual of its fit (regression.h); the steps that follow
/// train that away, and the merge at the end is exact.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>

#include <vector>

namespace reslora {

/// The plain LoRA that takes a layer's place: y = W x + bias + scaling B A x.
struct FinishedLayer {
  at::Tensor A;        ///< [r, in], A' / c, in fp32 (fp64 for fp64 factors)
  at::Tensor B;        ///< [out, r]; undefined: the layer keeps its own
  double scaling = 1;  ///< c times the layer's scaling
};

/// Returns the plain LoRA of every layer of a chain, from its fit where it has one.
///
/// The layer's step size under Adam is kept: with c = 1 + alpha* of the fit (2 in a doubled first
/// layer, 1 where nothing was fitted; kept within 0.5 and 8), a step of A / c moves the output as
/// far as a step of A did, and what enters B times c is what entered it before. Throws
/// c10::ValueError where a linked layer has no fit, or one of another rank (with moved taps).
RESLORA_API std::vector<FinishedLayer> finish_chain(const ChainView& chain);

}  // namespace reslora
