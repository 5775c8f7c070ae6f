// Rules that every calibration follows; see calibration.h.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/calibration.h>
#include <reslora/regression.h>

#include <cmath>
#include <limits>
#include <utility>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "merge/merge_rules.h"

namespace reslora {
namespace {

using at::Tensor;
using Moved = std::pair<int64_t, std::vector<Fit>>;  // a chain and its moved fits

/// The merge by the fits of `chains`, but for those in `moved`.
MergePlan plan_with(const std::vector<ChainView>& chains, const std::vector<Moved>& moved) {
  std::vector<ChainView> views = chains;
  for (const auto& [i, fits] : moved)
    for (size_t n = 0; n < fits.size(); ++n) views[i].layers[n].fit = fits[n];
  return {views, "lsq"};
}

std::vector<double> measured(const MoveMeasure& measure, int64_t count, const PlanOf& plan_of) {
  std::vector<double> found = measure(count, plan_of);
  RESLORA_CHECK(found.empty() || static_cast<int64_t>(found.size()) == count,
                "[calibrate] a measure must give one distance for each candidate; got {} for {}",
                found.size(), count);
  return found;
}

bool is_nearer(double distance, double plain) { return std::isfinite(plain) && distance < plain; }

}  // namespace

std::vector<Tensor> padding_masks(const std::vector<Tensor>& masks, const std::string& op) {
  std::vector<Tensor> checked;
  for (const Tensor& mask : masks) {
    if (!mask.defined()) continue;
    RESLORA_CHECK(detail::is_dense(mask) && !mask.is_meta(),
                  "[{}] a mask must be a dense tensor in memory; got {}", op,
                  detail::described(mask));
    RESLORA_CHECK(
        mask.scalar_type() == at::kBool || mask.eq(0).logical_or(mask.eq(1)).all().item<bool>(),
        "[{}] a mask [batch, tokens] must hold 1 for tokens and 0 for padding; got values "
        "from {:g} to {:g}",
        op, mask.min().item<double>(), mask.max().item<double>());
    Tensor own = mask.to(at::kBool);
    for (const Tensor& other : checked)
      RESLORA_CHECK(
          own.sizes() != other.sizes() || at::equal(own, other),
          "[{}] padded encoder and decoder inputs must differ in length to tell whose rows "
          "are whose; got [{}] for both: pad one side to another length",
          op, fmt::join(own.sizes(), ", "));
    checked.push_back(std::move(own));
  }
  return checked;
}

std::optional<Tensor> row_mask(const std::vector<Tensor>& masks, at::IntArrayRef leading) {
  for (const Tensor& mask : masks)
    RESLORA_CHECK(detail::is_dense(mask), "[row_mask] masks must be dense tensors; got {}",
                  detail::described(mask));
  for (const Tensor& mask : masks)
    if (mask.sizes() == leading || (leading.size() == 1 && leading[0] == mask.numel()))
      return mask.reshape({-1});
  return std::nullopt;
}

at::Tensor error_sum(const at::Tensor& reference, const at::Tensor& other) {
  detail::check_rows(reference, detail::kAny, "error_sum", "reference");
  detail::check_floating(other, reference.sizes(), "error_sum", "other");
  const at::Tensor scale = reference.square().mean().clamp_min(std::numeric_limits<float>::min());
  return (other - reference).square().mean(-1).sum() / scale;
}

MovedTaps choose_moves(const std::vector<ChainView>& chains, const MoveMeasure& measure) {
  RESLORA_CHECK(measure, "[calibrate] moved taps need a measure; got none");
  MovedTaps found;
  std::vector<Moved> tried;
  for (size_t i = 0; i < chains.size(); ++i) {
    detail::check_view(chains[i], "calibrate");
    auto& fits = found.fits.emplace_back();
    for (const LayerView& layer : chains[i].layers) fits.push_back(layer.fit);
    if (!detail::merges_exactly(chains[i].chain)) tried.emplace_back(i, move_taps(chains[i]));
  }
  if (tried.empty()) return found;
  // Candidate 0 moves nothing.
  const auto count = static_cast<int64_t>(tried.size()) + 1;
  const std::vector<double> alone = measured(measure, count, [&](int64_t k) {
    return plan_with(chains, k == 0 ? std::vector<Moved>() : std::vector<Moved>{tried[k - 1]});
  });
  std::vector<Moved> nearer;
  for (size_t k = 1; k < alone.size(); ++k)
    if (is_nearer(alone[k], alone[0])) nearer.push_back(tried[k - 1]);
  if (nearer.empty()) return found;
  const std::vector<double> both = measured(measure, 2, [&](int64_t k) {
    return plan_with(chains, k == 0 ? std::vector<Moved>() : nearer);
  });
  if (both.empty() || !is_nearer(both[1], both[0])) return found;
  found.before = both[0];
  found.after = both[1];
  for (auto& [i, fits] : nearer) {
    found.chains.push_back(i);
    found.fits[i] = std::move(fits);
  }
  return found;
}

bool has_moved_taps(const ChainView& view) {
  detail::check_size(view, "calibrate");
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    detail::check_fit(view, n, "calibrate");
    const Tensor& A = view.layers[n].fit.A;
    if (A.defined() && A.size(0) != view.chain.layer(n).r) return true;
  }
  return false;
}

void check_current(const std::string& fits_sum, const std::string& adapter_sum,
                   const std::string& op, const std::string& way_out) {
  RESLORA_CHECK(fits_sum == adapter_sum,
                "[{}] fits must be of the adapter as it is; got fits made before it changed: "
                "calibrate again, or {}",
                op, way_out);
}

std::string few_rows_warning(const std::vector<ChainView>& chains) {
  int64_t count = 0;
  std::string first;
  for (const ChainView& view : chains) {
    detail::check_size(view, "calibrate");
    for (int64_t n = 0; n < view.chain.size(); ++n) {
      const LayerShape& layer = view.chain.layer(n);
      const int64_t rows = view.layers[n].fit.rows;
      if (rows == 0 || rows >= layer.in_features || ++count > 1) continue;
      first = fmt::format("{} of {} in {}", rows, layer.in_features, layer.name);
    }
  }
  if (count == 0) return "";
  return fmt::format(
      "[calibrate] {} layers saw fewer rows than they have features ({}): the ridge carries the "
      "fit; more batches make it better",
      count, first);
}

}  // namespace reslora
