/// @file
/// The fast evaluation of all four shortcuts: one differentiable op, `adapt`.
///
/// @verbatim
/// u = drop(x) A^T           A = [A_0; A_1; ...], stacked inside
/// s = u[:, :R] + sum(taps)  R = rows of the blocks that have a B
/// y = x W^T + bias + sum over blocks k of scaling_k * s_k B_k^T
/// tap = u[:, R:]            rows of one more A block than B blocks: the next layer's tap, or
///     = u[:, :R]            with keep_tap: the own product before the taps were added
/// @endverbatim
///
/// Gradient convention: first derivatives only (a second backward, torch.func and vmap are refused
/// in a sentence); dtaps = ds; W and bias are frozen and get none. Saved for backward: x by
/// reference, s [T, R], the dropout bits [T, in/8] and the weights; never y nor a dropped-out copy
/// of x. Cost beyond the frozen layer: reads x twice, reads dy twice, writes y and dx once more;
/// taps and s are T x R. The literal formulas are in formulas.h; `Chain` says what to pass for each
/// shortcut.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/export.h>

#include <optional>
#include <vector>

namespace reslora {

/// What `adapt` reads. Leading dimensions "..." are those of x (T rows in all, any number of dims).
struct AdaptInput {
  at::Tensor x;                      ///< [..., in]
  std::optional<at::Tensor> weight;  ///< W [out, in], frozen, dtype of x; any strides
  std::optional<at::Tensor> bias;    ///< [out], frozen
  std::optional<at::Tensor>
      base_out;                    ///< [..., out]: output of a black-box base, instead of weight
  std::vector<at::Tensor> A;       ///< each [r_k, in]; as many as B, or one more (the tap rows)
  std::vector<at::Tensor> B;       ///< each [out, r_k]
  std::vector<double> scaling;     ///< one per B
  std::vector<at::Tensor> taps;    ///< each [..., R]
  double dropout = 0;              ///< in [0, 1)
  std::optional<at::Tensor> bits;  ///< uint8 [T, ceil(in/8)], 1 = kept; drawn where absent
  bool keep_tap = false;           ///< return the own product as `tap`
  bool want_norms = false;         ///< return |x|_F and |own product|_F
};

/// What `adapt` returns; undefined where it was not asked for.
struct AdaptOutput {
  at::Tensor y;      ///< [..., out]
  at::Tensor s;      ///< [..., R], what entered B
  at::Tensor tap;    ///< [..., r] for a later layer; empty [0] where none was asked for
  at::Tensor bits;   ///< the dropout bits drawn; empty [0] where given or not needed
  at::Tensor norms;  ///< fp32 [2], of x before dropout and of u[:, :R]; empty [0] where not wanted
};

/// Evaluates one adapted layer. Throws c10::ValueError where shapes, dtypes or devices disagree.
/// A and B may have another dtype or device than x: they are cast when stacked, their gradients
/// come back in their own. Works on every device that ATen serves; CPU has a kernel of its own.
RESLORA_API AdaptOutput adapt(const AdaptInput& input);

/// Evaluates layers that read one x (q, k and v; gate and up) as one: x is read once for all
/// down-projections, they share one dropout mask, and dx is one sum. All inputs must have the same
/// tensor x, dropout, bits and want_norms; otherwise as `adapt`, whose outputs it returns.
RESLORA_API std::vector<AdaptOutput> adapt_together(const std::vector<AdaptInput>& inputs);

/// Writes `norms` (an output of `adapt`) into the next column of ring [2, N] and adds one to count
/// [1], both on the device and without a host sync. Threads may call it for one ring at once: none
/// of their records is lost (on a GPU, where they share a stream). Throws c10::ValueError for other
/// shapes, dtypes or devices, and on the CPU for a count that is negative or at its end.
RESLORA_API void record_norms(const at::Tensor& norms, const at::Tensor& ring,
                              const at::Tensor& count);

/// Adds the products of a forward to the sums of a layer: with u = s - the sum of `taps`, its own
/// product, `products` [2r, 2r] becomes decay * products + [s u]^T [s u], in float32 and without a
/// host sync. `s` [..., r] is an output of `adapt`, `taps` each [..., r] what was added there.
/// Costs (2 + taps) calls of ATen and a copy [T, 2r]. Threads may call it at once, as
/// `record_norms`. Throws c10::ValueError for other shapes, dtypes or devices and for a decay
/// outside [0, 1].
RESLORA_API void record_products(const at::Tensor& s, at::TensorList taps,
                                 const at::Tensor& products, double decay);

/// Throws c10::ValueError where this copy of libreslora is the second of the process, whose ops
/// are those of the first. The functions above ask by themselves.
RESLORA_API void check_single_copy();

}  // namespace reslora
