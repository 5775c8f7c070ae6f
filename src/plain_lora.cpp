// Planned pairs in the shapes that files of plain LoRA want: padded or reduced to a rank.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/merge.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "detail/check.h"
#include "internal/precision.h"

namespace reslora {

std::pair<at::Tensor, at::Tensor> padded_factors(const LayerMerge& layer, int64_t R) {
  const int64_t rank = layer.A.size(0);
  RESLORA_CHECK(R >= rank, "[merge] R must be at least the layer's rank {}; got {} (layer {})",
                rank, R, layer.name);
  return {at::constant_pad_nd(layer.A, {0, 0, 0, R - rank}),
          at::constant_pad_nd(layer.B, {0, R - rank})};
}

ReducedFactors reduced_factors(const LayerMerge& layer, int64_t max_rank, double tolerance) {
  RESLORA_CHECK(max_rank >= 1, "[export] rank must be at least 1; got {} (layer {})", max_rank,
                layer.name);
  RESLORA_CHECK(std::isfinite(tolerance) && tolerance >= 0 && tolerance < 1,
                "[export] tolerance must lie in [0, 1); got {} (layer {})", tolerance, layer.name);
  const detail::FullPrecision guard;
  RESLORA_CHECK(
      at::isfinite(layer.A).all().item<bool>() && at::isfinite(layer.B).all().item<bool>(),
      "[export] factors must be finite; got NaN or infinity (layer {})", layer.name);
  // B A = Qb (Rb Ra^T) Qa^T: the singular values are those of the small core.
  const auto [q_b, r_b] = at::linalg_qr(layer.B.to(at::kDouble));
  const auto [q_a, r_a] = at::linalg_qr(layer.A.to(at::kDouble).t());
  const auto [u, values, vh] = at::linalg_svd(at::mm(r_b, r_a.t()), /*full_matrices=*/false);
  // left[k]: what is lost, squared, when the k largest are kept; summed from the small end, since
  // the difference of two large sums would lose it.
  const at::Tensor squares = values.square().to(at::kCPU).contiguous();
  std::vector<double> left(squares.size(0) + 1, 0.0);
  for (int64_t k = squares.size(0) - 1; k >= 0; --k) {
    left[k] = left[k + 1] + squares.const_data_ptr<double>()[k];
  }
  const double total = left[0];
  int64_t rank = 1;
  while (rank < std::min<int64_t>(max_rank, squares.size(0)) &&
         left[rank] > tolerance * tolerance * total) {
    ++rank;
  }
  const double lost = left[rank];
  const at::Tensor root = values.narrow(0, 0, rank).sqrt();
  ReducedFactors reduced;
  reduced.layer = layer;
  reduced.layer.B = (at::mm(q_b, u.narrow(1, 0, rank)) * root).to(layer.B.scalar_type());
  reduced.layer.A =
      (root.unsqueeze(1) * at::mm(vh.narrow(0, 0, rank), q_a.t())).to(layer.A.scalar_type());
  reduced.error = total > 0 ? std::sqrt(lost / total) : 0;
  return reduced;
}

}  // namespace reslora
