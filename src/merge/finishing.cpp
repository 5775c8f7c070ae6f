// Plain LoRA in the place of linked layers, in the middle of a training; see finishing.h.
#include <ATen/TensorOperators.h>
#include <reslora/finishing.h>

#include <algorithm>

#include "core/check.h"
#include "core/precision.h"
#include "merge/merge_rules.h"

namespace reslora {
namespace {

// Bounds of c, for fits that are far from a multiple of A.
constexpr double kLeast = 0.5, kMost = 8;

}  // namespace

std::vector<FinishedLayer> finish_chain(const ChainView& chain) {
  const detail::FullPrecision guard;
  detail::check_view(chain);
  const std::vector<LayerMerge> planned =
      detail::plan_chain(chain, MergeRule::kLsq, /*use_affine=*/false);
  std::vector<FinishedLayer> finished;
  for (int64_t n = 0; n < chain.chain.size(); ++n) {
    const LayerShape& shape = chain.chain.layer(n);
    const Fit& fit = chain.layers[n].fit;
    RESLORA_CHECK(planned[n].A.size(0) == shape.r,
                  "[finish] fits must have the rank of the adapter, r = {}; got one of rank {}, "
                  "with moved taps (layer {}): pass batches, or calibrate with move_taps=False",
                  shape.r, planned[n].A.size(0), shape.name);
    const bool is_fitted = fit.A.defined(), is_doubled = chain.chain.wiring(n).is_doubled;
    const double c = is_doubled ? 2 : is_fitted ? std::clamp(1 + fit.alpha_star, kLeast, kMost) : 1;
    // Without a fit, the 2 of a doubled layer lies in the B of its plan.
    const double in_plan = is_doubled && !is_fitted ? 2 : 1;
    finished.push_back({planned[n].A * (in_plan / c), fit.B, c * shape.scaling});
  }
  return finished;
}

}  // namespace reslora
