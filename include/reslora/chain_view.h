/// @file
/// A chain together with its tensors: what merging and files work on, never modules.
///
/// C++ modules and Python's both fill it, so that neither is known below. Views share memory with
/// the parameters they show; nothing is copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain.h>
#include <reslora/norm_window.h>

#include <vector>

namespace reslora {

/// A plain LoRA that stands for a linked layer: y = W x + bias + scaling B A x, or in its affine
/// form y = W x + bias + scaling B (affine_A x + offset). Made by regression (regression.h).
struct Fit {
  at::Tensor A = {};           ///< [r', in]; undefined: there is no fit
  at::Tensor B = {};           ///< [out, r']; undefined: the layer's own, and r' is its r
  at::Tensor affine_A = {};    ///< [r', in] and
  at::Tensor offset = {};      ///< [r']; both undefined where no affine form was fitted
  double alpha_star = 0;       ///< the best scalar: A' = (1 + alpha*) A
  double residual = 0;         ///< |v - A x|_F / |v|_F over the calibration rows
  double affine_residual = 0;  ///< the same of the affine form
  int64_t rows = 0;            ///< calibration rows
  int64_t refine_steps = 0;    ///< steps of distillation after the regression
};

/// The tensors of one layer of a chain. `weight` may be any strided view [out, in].
struct LayerView {
  at::Tensor weight;     ///< undefined where only factors are wanted; then `apply` and the rule
                         ///< `weight` refuse the layer
  at::Tensor A;          ///< [r, in]
  at::Tensor B;          ///< [out, r]
  NormWindow norms;      ///< undefined where none were recorded
  at::Tensor bias = {};  ///< [out], undefined where there is none; changed by an affine fit only
  Fit fit = {};          ///< for the rule `lsq`
};

/// One chain: its links and its tensors, in the same order.
struct ChainView {
  Chain chain;                    ///< order and links
  std::vector<LayerView> layers;  ///< parallel to the chain's positions
};

}  // namespace reslora
