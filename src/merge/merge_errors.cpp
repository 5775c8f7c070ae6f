// Errors of planned merges; see merge_errors.h.
#include <ATen/autocast_mode.h>
#include <reslora/merge_errors.h>

#include "core/check.h"
#include "core/precision.h"
#include "core/tensor_checks.h"
#include "merge/merged_weight.h"
#include "merge/rows.h"

namespace reslora {

using at::Tensor;
using detail::as_rows;
using detail::square_sum;

namespace {

constexpr const char* kOp = "layer_errors";

void check_call(const LayerMerge& planned, const Tensor& x, const Tensor& s, const Tensor& y,
                const std::vector<Tensor>& B, const std::optional<Tensor>& mask) {
  detail::check_pair(planned, kOp);
  const int64_t out = planned.B.size(0);
  int64_t rank = 0;
  for (const Tensor& block : B) {
    detail::check_floating(block, {out, detail::kAny}, kOp, "B", planned.name);
    rank += block.size(1);
  }
  detail::check_rows(x, planned.A.size(1), kOp, "x", planned.name);
  detail::check_rows(s, rank, kOp, "s", planned.name);
  detail::check_rows(y, out, kOp, "y", planned.name);
  const auto leading = [](const Tensor& tensor) {
    return tensor.sizes().slice(0, tensor.dim() - 1);
  };
  RESLORA_CHECK(leading(s) == leading(x) && leading(y) == leading(x),
                "[layer_errors] x, s and y must have the same rows; got {}, {} and {} (layer {})",
                detail::described(x), detail::described(s), detail::described(y), planned.name);
  RESLORA_CHECK(!mask || (detail::is_dense(*mask) && !mask->is_meta() &&
                          mask->numel() == c10::multiply_integers(leading(x))),
                "[layer_errors] a mask must have one element for each row of x, {}; got {} (layer "
                "{})",
                detail::described(x), detail::described(*mask), planned.name);
}

}  // namespace

LayerErrors layer_errors(const LayerMerge& planned, const Tensor& x, const Tensor& s,
                         const Tensor& y, const std::vector<Tensor>& B,
                         const std::vector<double>& scaling, const Tensor& weight,
                         const std::optional<Tensor>& mask) {
  RESLORA_CHECK(!B.empty() && B.size() == scaling.size(),
                "[layer_errors] B and scaling must be lists of one length; got {} and {} (layer "
                "{})",
                B.size(), scaling.size(), planned.name);
  check_call(planned, x, s, y, B, mask);
  const detail::FullPrecision guard;
  const auto dtype = planned.A.scalar_type();
  const Tensor rows = as_rows(x, dtype, mask);
  const auto options = rows.options();
  std::vector<Tensor> blocks;
  for (size_t k = 0; k < B.size(); ++k) blocks.push_back(B[k].detach().to(options) * scaling[k]);
  // The base product is the same on both sides: only the low-rank terms are compared.
  const Tensor wanted = at::mm(as_rows(s, dtype, mask), at::cat(blocks, 1).t());
  Tensor error =
      at::mm(at::mm(rows, planned.A.to(options).t()), planned.B.to(options).t()) - wanted;
  if (planned.bias.defined()) error = error + planned.bias.to(options);
  LayerErrors errors;
  errors.method = square_sum(error);
  errors.whole = square_sum(as_rows(y, dtype, mask));
  errors.both = errors.method;
  if (!weight.defined()) return errors;
  const Tensor exact = merged_weight(weight.detach(), planned);
  const Tensor lost = (exact.to(weight.scalar_type()).to(exact.scalar_type()) - exact).to(options);
  const Tensor rounding = at::mm(rows, lost.t());
  errors.rounding = square_sum(rounding);
  errors.both = square_sum(error + rounding);
  return errors;
}

Tensor merged_forward(const LayerMerge& planned, const Tensor& x, const Tensor& weight,
                      const Tensor& bias) {
  detail::check_weight(weight, planned, "merging");
  detail::check_rows(x, weight.size(1), "merge", "x", planned.name);
  if (bias.defined()) detail::check_floating(bias, {weight.size(0)}, "merge", "bias", planned.name);
  const bool is_cast = at::autocast::is_autocast_enabled(x.device().type());
  const auto is_like_x = [&](const Tensor& tensor) {
    return (is_cast || tensor.scalar_type() == x.scalar_type()) && tensor.device() == x.device();
  };
  RESLORA_CHECK(is_like_x(weight) && (!bias.defined() || is_like_x(bias)),
                "[merge] x, weight and bias must have one dtype on one device; got {}, {} and {} "
                "(layer {})",
                detail::described(x), detail::described(weight), detail::described(bias),
                planned.name);
  const Tensor merged = merged_weight(weight.detach(), planned).to(weight.scalar_type());
  RESLORA_CHECK(bias.defined() || !planned.bias.defined(),
                "[merge] an affine fit needs the bias that it moves; got none (layer {}): give it, "
                "or plan without use_affine",
                planned.name);
  if (!bias.defined()) return at::linear(x, merged);
  Tensor own_bias = bias.detach();
  if (planned.bias.defined()) {
    own_bias = (own_bias.to(planned.bias.options()) + planned.bias).to(bias.options());
  }
  return at::linear(x, merged, own_bias);
}

}  // namespace reslora
