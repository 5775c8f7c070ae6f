/// @file
/// The paper on one page: every formula of ResLoRA, literally, in plain ATen.
///
/// Slow on purpose, any dtype, differentiable by autograd: this is the oracle that everything fast
/// is compared with, and nothing fast calls the forward formulas. Source: Shi et al., arXiv
/// 2402.18039; equation numbers are the paper's. Rows are tokens: x_n is [..., in], y_n is [...,
/// out].
///
/// Two conventions: `scaling` is LoRA's lora_alpha / r, which the paper omits; `alpha_star` is the
/// paper's alpha*, the factor that stands for a neighbour's input when a shortcut is merged away.
///
/// All throw c10::ValueError for tensors that do not fit together, and for an index that is none.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/config.h>
#include <reslora/export.h>

#include <cstdint>
#include <vector>

namespace reslora::formulas {

/// One adapted layer of a chain, in the paper's symbols.
struct Block {
  at::Tensor W;        ///< [out, in]
  at::Tensor bias;     ///< [out], or undefined
  at::Tensor A;        ///< [r, in]
  at::Tensor B;        ///< [out, r]
  double scaling = 1;  ///< lora_alpha / r
};

/// Plain LoRA (eq. 1): y = W x + s B A x.
RESLORA_API at::Tensor forward_none(const Block& block, const at::Tensor& x);

/// Input shortcut (eq. 2): y_n = W_n x_n + s B_n A_n (x_n + x_{n-1}). Pass x_n itself as x_previous
/// in the first layer of a chain ("double"), or an undefined tensor to leave the term out
/// ("plain").
RESLORA_API at::Tensor forward_is(const Block& block, const at::Tensor& x,
                                  const at::Tensor& x_previous);

/// Block shortcut (eq. 3): y_n = W_n x_n + sum_{k=0..m} s_{n-k} B_{n-k} A_{n-k} x_n.
/// blocks[n] is the layer itself; m is clipped to n; m = -1 means all.
RESLORA_API at::Tensor forward_bs(const std::vector<Block>& blocks, int64_t n, int64_t m,
                                  const at::Tensor& x);

/// Middle shortcut (eq. 4): y_n = W_n x_n + s_n B_n sum_{k=0..m} A_{n-k} x_{n-k}.
/// xs[j] is the input of layer j; m as above.
RESLORA_API at::Tensor forward_ms(const std::vector<Block>& blocks, int64_t n, int64_t m,
                                  const std::vector<at::Tensor>& xs);

/// alpha* by input (eq. 6-9, 12): the ratio of windowed mean norms f_{n-k} / f_n. For `is` and
/// `factored` f is the mean of |x|_F, for `ms` by input the mean of |A x|_F (own product, no taps).
RESLORA_API double alpha_star_input(double f_previous, double f_own);

/// alpha* by weights (eq. 10-11, 13): f*_{n-k-1} / f*_{n-1} with f*_j = |W*_j|_F of the already
/// merged layers, because h_{j}, the output of layer j's matrix, is taken to stand for x_{j+1}; 1
/// where an index does not exist. The wording gives f*_{n-2} to W*_{n-1}, which read literally
/// would be circular; this is the reading that can be computed. The authors' program adds BA
/// without scaling and without (1 + alpha*), and changes W in place while doing so; neither is done
/// here.
RESLORA_API double alpha_star_weight(const std::vector<double>& merged_norms, int64_t n, int64_t k);

/// Merged weight of `none`: W + s B A (exact).
RESLORA_API at::Tensor merged_none(const Block& block);

/// Merged weight of `is` (eq. 5, 9): W + s (1 + alpha*) B A. The first layer of a chain: alpha* = 1
/// ("double", exact) or 0 ("plain", exact).
RESLORA_API at::Tensor merged_is(const Block& block, double alpha_star);

/// Merged weight of `bs`: W_n + sum_{k=0..m} s_{n-k} B_{n-k} A_{n-k} (exact).
RESLORA_API at::Tensor merged_bs(const std::vector<Block>& blocks, int64_t n, int64_t m);

/// Merged weight of `ms` by input (eq. 12): W_n + s (1 + sum_k alpha*_{n-k}) B_n A_n.
RESLORA_API at::Tensor merged_ms_input(const Block& block, const std::vector<double>& alpha_star);

/// Merged weight of `ms` by weights (eq. 13): W_n + s B_n (A_n + sum_{k=1..m} alpha*_{n-k}
/// A_{n-k}); alpha_star[k-1] belongs to k. The paper leaves f open: the rule `weight` uses
/// alpha_star_weight, `factored` (the authors' program) alpha_star_input over |x|_F. Needs equal
/// in_features.
RESLORA_API at::Tensor merged_ms_weight(const std::vector<Block>& blocks, int64_t n,
                                        const std::vector<double>& alpha_star);

}  // namespace reslora::formulas
