// Errors of planned merges; see merge_errors.h.
#include <reslora/merge_errors.h>

#include "core/check.h"
#include "core/precision.h"
#include "merge/rows.h"

namespace reslora {

using at::Tensor;
using detail::as_rows;
using detail::square_sum;

LayerErrors layer_errors(const LayerMerge& planned, const Tensor& x, const Tensor& s,
                         const Tensor& y, const std::vector<Tensor>& B,
                         const std::vector<double>& scaling, const Tensor& weight,
                         const std::optional<Tensor>& mask) {
  RESLORA_CHECK(!B.empty() && B.size() == scaling.size(),
                "[layer_errors] B and scaling must be lists of one length; got {} and {} (layer "
                "{})",
                B.size(), scaling.size(), planned.name);
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
