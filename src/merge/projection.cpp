// Least squares for A' within what A_n sees, from r x r sums; see projection.h.
#include "merge/projection.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>

#include "core/check.h"
#include "core/precision.h"
#include "core/tensor_checks.h"

namespace reslora::detail {
namespace {

// The pull in units of the mean square of u: of 0.03 to 3 the best on trained adapters, all told.
constexpr double kPull = 0.3;
// Least squares give a mean of what s may be for a u, which is shorter than s. So M is pulled to
// the factor of the regression the other way round, unless u tells next to nothing of s.
constexpr double kLeastCorrelation = 0.5;

}  // namespace

Projection solve_projection(const NormWindow& window, const LayerShape& layer) {
  const FullPrecision guard;
  const at::Tensor& stored = window.products();
  RESLORA_CHECK(window.has_products(),
                "[merge] rule 'projected' needs the sums that training forwards leave, and layer "
                "{} has none: train with norm_window > 0, or use merge_method 'weight'",
                layer.name);
  RESLORA_CHECK(stored.size(0) == 2 * layer.r,
                "[merge] sums of products must be of the layer's rank, [{0}, {0}]; got {1} (layer "
                "{2})",
                2 * layer.r, described(stored), layer.name);
  const at::Tensor sums = stored.to(at::kCPU, at::kDouble);
  RESLORA_CHECK(std::isfinite(sums.sum().item<double>()),
                "[merge] rule 'projected' needs finite sums of products; got NaN or infinity "
                "(layer {}): use merge_method 'weight'",
                layer.name);
  const at::Tensor ss = sums.narrow(0, 0, layer.r).narrow(1, 0, layer.r);
  const at::Tensor su = sums.narrow(0, 0, layer.r).narrow(1, layer.r, layer.r);
  const at::Tensor uu = sums.narrow(0, layer.r, layer.r).narrow(1, layer.r, layer.r);
  const double s_square = ss.trace().item<double>(), u_square = uu.trace().item<double>();
  const at::Tensor identity = at::eye(layer.r, sums.options());
  if (!(u_square > 0) || !(s_square > 0)) return {identity, s_square > 0 ? 1.0 : 0.0};  // s or u: 0
  const double ratio = std::sqrt(s_square / u_square);
  const double correlation = su.trace().item<double>() / std::sqrt(s_square * u_square);
  const double c = ratio / std::max(correlation, kLeastCorrelation);
  const at::Tensor pulled = uu + identity * (kPull * u_square / static_cast<double>(layer.r));
  const at::Tensor M = identity * c + at::linalg_solve(pulled, (su - uu * c).t()).t();
  const double square =
      s_square - 2 * (M * su).sum().item<double>() + (at::mm(M, uu) * M).sum().item<double>();
  return {M, std::sqrt(std::max(0.0, square) / s_square)};
}

}  // namespace reslora::detail
