// A chain together with its tensors: what merging and files work on, never modules.
//
// C++ modules and Python's both fill it, so that neither is known below. Views share memory with
// the parameters they show; nothing is copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain.h>
#include <reslora/norm_window.h>

#include <vector>

namespace reslora {

/// The tensors of one layer of a chain. `weight` may be any strided view [out, in].
struct LayerView {
  at::Tensor weight;  // undefined where only factors are wanted; then `apply` and the rule `weight`
                      // refuse the layer
  at::Tensor A;       // [r, in]
  at::Tensor B;       // [out, r]
  NormWindow norms;   // undefined where none were recorded
};

/// One chain: its links and its tensors, in the same order.
struct ChainView {
  Chain chain;
  std::vector<LayerView> layers;
};

}  // namespace reslora
