// What each merge rule makes of a chain; see merge_rules.h. Planning reads adapters and norms; only
// the rule `weight` reads base weights, one matrix at a time.
#include "merge/merge_rules.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/formulas.h>
#include <reslora/regression.h>

#include <cmath>
#include <optional>
#include <utility>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "merge/merged_weight.h"
#include "merge/projection.h"

namespace reslora {
namespace detail {
namespace {

using at::Tensor;

/// True where every norm that the rule `input` would read is there.
bool has_all_norms(const ChainView& view) {
  std::vector<bool> is_read(view.layers.size(), false);
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    if (view.chain.merges_exactly(n)) continue;
    is_read[n] = true;
    for (const int64_t j : view.chain.reached(n)) is_read[j] = true;
  }
  for (size_t j = 0; j < is_read.size(); ++j) {
    if (is_read[j] && view.layers[j].norms.filled() == 0) return false;
  }
  return true;
}

/// True where every layer that does not merge exactly has a fit.
bool has_all_fits(const ChainView& view) {
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    if (!view.chain.merges_exactly(n) && !view.layers[n].fit.A.defined()) return false;
  }
  return true;
}

/// True where every layer that does not merge exactly has sums of products.
bool has_all_products(const ChainView& view) {
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    if (!view.chain.merges_exactly(n) && !view.layers[n].norms.has_products()) return false;
  }
  return true;
}

/// Device of the layer's A, fp32, or fp64 where an adapter among `positions` is fp64.
at::TensorOptions factor_options(const ChainView& view, int64_t n,
                                 const std::vector<int64_t>& positions) {
  bool is_double = false;
  for (const int64_t j : positions) {
    const LayerView& layer = view.layers[j];
    is_double |= layer.A.scalar_type() == at::kDouble || layer.B.scalar_type() == at::kDouble;
  }
  return view.layers[n].A.options().dtype(is_double ? at::kDouble : at::kFloat);
}

/// none, bs and unlinked layers: the blocks of the wiring side by side, scalings folded into B.
LayerMerge exact_merge(const ChainView& view, int64_t n) {
  const Wiring& wiring = view.chain.wiring(n);
  const at::TensorOptions options = factor_options(view, n, wiring.b);
  std::vector<Tensor> A;
  std::vector<Tensor> B;
  for (size_t k = 0; k < wiring.b.size(); ++k) {
    const LayerView& block = view.layers[wiring.b[k]];
    A.push_back(block.A.to(options));
    B.push_back(block.B.to(options) * wiring.scaling[k]);
  }
  return {view.chain.layer(n).name, MergeRule::kExact, {}, at::cat(A, 0), at::cat(B, 1)};
}

/// is, and ms by input: s (1 + sum of alpha*) B A.
LayerMerge scaled_merge(const ChainView& view, int64_t n, MergeRule rule,
                        std::vector<double> alpha_star) {
  double factor = 1;
  for (const double alpha : alpha_star) factor += alpha;
  const LayerView& own = view.layers[n];
  const at::TensorOptions options = factor_options(view, n, {n});
  const double scaling = view.chain.layer(n).scaling;
  return {view.chain.layer(n).name, rule, std::move(alpha_star),
          own.A.to(options, /*non_blocking=*/false, /*copy=*/true),
          own.B.to(options) * (scaling * factor)};
}

/// ms by weights: s B (A_n + sum of alpha*_{n-k} A_{n-k}).
LayerMerge summed_merge(const ChainView& view, int64_t n, MergeRule rule,
                        std::vector<double> alpha_star) {
  const LayerShape& shape = view.chain.layer(n);
  const std::vector<int64_t> reached = view.chain.reached(n);
  std::vector<int64_t> positions = reached;
  positions.push_back(n);
  const at::TensorOptions options = factor_options(view, n, positions);
  Tensor A = view.layers[n].A.to(options, /*non_blocking=*/false, /*copy=*/true);
  for (size_t k = 0; k < reached.size(); ++k) {
    const LayerShape& other = view.chain.layer(reached[k]);
    RESLORA_CHECK(
        other.in_features == shape.in_features,
        "[merge] rule '{}' adds A of layer {} to A of layer {}, which needs equal "
        "in_features; got {} and {}: give calibration batches (calibrate) for 'lsq', or train with "
        "norm_window > 0 for 'input'",
        merge_rule_name(rule), other.name, shape.name, other.in_features, shape.in_features);
    A.add_(view.layers[reached[k]].A.to(options), alpha_star[k]);
  }
  return {shape.name, rule, std::move(alpha_star), A, view.layers[n].B.to(options) * shape.scaling};
}

/// lsq and refined: the plain LoRA that was fitted.
LayerMerge fitted_merge(const ChainView& view, int64_t n, bool use_affine) {
  const LayerView& layer = view.layers[n];
  const LayerShape& shape = view.chain.layer(n);
  const Fit& fit = layer.fit;
  const bool is_affine = use_affine && fit.offset.defined() && layer.bias.defined();
  const Tensor& A = is_affine ? fit.affine_A : fit.A;
  const Tensor& B = fit.B.defined() ? fit.B : layer.B;
  check_fit(view, n);
  if (is_affine) check_floating(layer.bias, {shape.out_features}, "merge", "bias", shape.name);
  const at::TensorOptions options = factor_options(view, n, {n});
  LayerMerge merged{shape.name,
                    fit.refine_steps > 0 ? MergeRule::kRefined : MergeRule::kLsq,
                    {},
                    A.to(options, /*non_blocking=*/false, /*copy=*/true),
                    B.to(options) * shape.scaling};
  if (is_affine) merged.bias = at::mv(merged.B, fit.offset.to(options));
  if (fit.rows > 0) merged.residual = is_affine ? fit.affine_residual : fit.residual;
  return merged;
}

/// projected: A' = M A_n.
LayerMerge projected_merge(const ChainView& view, int64_t n) {
  const LayerView& layer = view.layers[n];
  const LayerShape& shape = view.chain.layer(n);
  const Projection found = solve_projection(layer.norms, shape);
  const at::TensorOptions options = factor_options(view, n, {n});
  LayerMerge merged{shape.name,
                    MergeRule::kProjected,
                    {},
                    at::mm(found.M.to(options), layer.A.to(options)),
                    layer.B.to(options) * shape.scaling};
  merged.residual = found.residual;
  return merged;
}

/// f_n: the mean norm of a window, refused where the rule cannot use it.
double mean_norm(const ChainView& view, int64_t n, MergeRule rule, Norm which) {
  const std::string& name = view.chain.layer(n).name;
  const std::optional<double> mean = view.layers[n].norms.mean(which);
  RESLORA_CHECK(mean.has_value(),
                "[merge] rule '{}' needs recorded norms, and layer {} has none: train with "
                "norm_window > 0, or use merge_method 'weight'",
                merge_rule_name(rule), name);
  RESLORA_CHECK(std::isfinite(*mean),
                "[merge] rule '{}' needs finite mean norms; got {} (layer {}): use merge_method "
                "'weight'",
                merge_rule_name(rule), *mean, name);
  return *mean;
}

/// Computes alpha* for the layers of one chain; each norm is read or formed at most once.
class AlphaStar {
 public:
  AlphaStar(const ChainView& view, MergeRule rule)
      : view_(view), rule_(rule), means_(view.layers.size()) {}

  /// `merged` holds the plans of the layers before n.
  std::vector<double> of(int64_t n, const LayerMerge* merged) {
    std::vector<double> alpha_star;
    for (const int64_t j : view_.chain.reached(n)) {
      alpha_star.push_back(rule_ == MergeRule::kWeight ? by_weight(n, n - j, merged)
                                                       : by_input(n, j));
    }
    return alpha_star;
  }

 private:
  double by_input(int64_t n, int64_t previous) {
    const double own = mean(n);
    RESLORA_CHECK(
        own > 0,
        "[merge] rule '{}' divides by the layer's mean norm, which must be greater than 0; "
        "got {} (layer {}): use merge_method 'weight'",
        merge_rule_name(rule_), own, view_.chain.layer(n).name);
    return formulas::alpha_star_input(mean(previous), own);
  }

  double by_weight(int64_t n, int64_t k, const LayerMerge* merged) {
    while (static_cast<int64_t>(merged_norms_.size()) < n) {
      const size_t j = merged_norms_.size();
      merged_norms_.push_back(merged_norm(view_.layers[j].weight, merged[j]));
    }
    // The first layers divide by nothing: alpha* is 1 where index n-k-1 does not exist.
    RESLORA_CHECK(
        n - k - 1 < 0 || merged_norms_[n - 1] > 0,
        "[merge] rule 'weight' divides by the norm of the merged weight before, which must "
        "be greater than 0; got 0 (layer {}): use merge_method 'input'",
        view_.chain.layer(n - 1).name);
    return formulas::alpha_star_weight(merged_norms_, n, k);
  }

  double mean(int64_t n) {
    // ms by input compares own products; everything else compares inputs.
    const bool is_product = rule_ == MergeRule::kInput && view_.chain.shortcut() == Shortcut::kMs;
    if (!means_[n].has_value()) {
      means_[n] = mean_norm(view_, n, rule_, is_product ? Norm::kOwnProduct : Norm::kInput);
    }
    return *means_[n];
  }

  static double merged_norm(const Tensor& weight, const LayerMerge& layer) {
    check_weight(weight, layer, "rule 'weight'");
    const double norm = norm_of(unchecked_merged_weight(weight, layer));
    RESLORA_CHECK(std::isfinite(norm),
                  "[merge] rule 'weight' needs merged weights of finite norm; got {} (layer {})",
                  norm, layer.name);
    return norm;
  }

  const ChainView& view_;
  MergeRule rule_;
  std::vector<std::optional<double>> means_;
  std::vector<double> merged_norms_;
};

/// alpha* of the layers that layer n reaches by |x|_F; nothing where a norm is missing or no use.
std::optional<std::vector<double>> factors_by_norms(const ChainView& view, int64_t n) {
  const std::optional<double> own = view.layers[n].norms.mean(Norm::kInput);
  if (!own || !std::isfinite(*own) || *own <= 0) return std::nullopt;
  std::vector<double> factors;
  for (const int64_t j : view.chain.reached(n)) {
    const std::optional<double> other = view.layers[j].norms.mean(Norm::kInput);
    if (!other || !std::isfinite(*other)) return std::nullopt;
    factors.push_back(formulas::alpha_star_input(*other, *own));
  }
  return factors;
}

}  // namespace

bool merges_exactly(const Chain& chain) {
  for (int64_t n = 0; n < chain.size(); ++n) {
    if (!chain.merges_exactly(n)) return false;
  }
  return true;
}

void check_size(const ChainView& view, const char* op) {
  RESLORA_CHECK(static_cast<int64_t>(view.layers.size()) == view.chain.size(),
                "[{}] a chain needs the tensors of each of its layers; got {} for {} layers", op,
                view.layers.size(), view.chain.size());
}

void check_view(const ChainView& view, const char* op) {
  check_size(view, op);
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    const LayerShape& shape = view.chain.layer(n);
    check_floating(view.layers[n].A, {shape.r, shape.in_features}, op, "A", shape.name);
    check_floating(view.layers[n].B, {shape.out_features, shape.r}, op, "B", shape.name);
  }
}

void check_fit(const ChainView& view, int64_t n, const char* op) {
  const LayerShape& shape = view.chain.layer(n);
  const Fit& fit = view.layers[n].fit;
  if (!fit.A.defined()) return;
  // A fit that brings its own B may have more rows than the adapter.
  const int64_t r = fit.B.defined() && fit.A.dim() == 2 ? fit.A.size(0) : shape.r;
  check_floating(fit.A, {r, shape.in_features}, op, "A of the fit", shape.name);
  if (fit.B.defined())
    check_floating(fit.B, {shape.out_features, r}, op, "B of the fit", shape.name);
  if (!fit.offset.defined()) return;
  check_floating(fit.affine_A, {r, shape.in_features}, op, "affine_A of the fit", shape.name);
  check_floating(fit.offset, {r}, op, "offset of the fit", shape.name);
}

MergeRule choose_rule(const std::vector<ChainView>& chains, const std::string& merge_method) {
  if (!merge_method.empty()) return parse_merge_rule(merge_method);
  bool is_exact = true;
  bool has_fits = true;
  bool has_products = true;
  bool has_norms = true;
  for (const ChainView& view : chains) {
    is_exact = is_exact && merges_exactly(view.chain);
    has_fits = has_fits && has_all_fits(view);
    has_products = has_products && has_all_products(view);
    has_norms = has_norms && has_all_norms(view);
  }
  if (is_exact) return MergeRule::kExact;
  if (has_fits) return MergeRule::kLsq;
  if (has_products) return MergeRule::kProjected;
  return has_norms ? MergeRule::kInput : MergeRule::kWeight;
}

std::vector<LayerMerge> plan_chain(const ChainView& view, MergeRule rule, bool use_affine) {
  const Chain& chain = view.chain;
  const bool is_summed = chain.shortcut() == Shortcut::kMs && rule != MergeRule::kInput;
  std::vector<LayerMerge> layers;
  AlphaStar alpha_star(view, rule);
  for (int64_t n = 0; n < chain.size(); ++n) {
    const bool has_fit = rule == MergeRule::kLsq && view.layers[n].fit.A.defined();
    if (has_fit) {
      layers.push_back(fitted_merge(view, n, use_affine));
      continue;
    }
    if (chain.merges_exactly(n)) {
      layers.push_back(exact_merge(view, n));
      continue;
    }
    RESLORA_CHECK(rule != MergeRule::kExact,
                  "[merge] rule 'exact' serves none, bs and unlinked layers only; got a linked "
                  "'{}' layer ({}): use merge_method 'lsq', 'input' or 'weight'",
                  shortcut_name(chain.shortcut()), chain.layer(n).name);
    RESLORA_CHECK(rule != MergeRule::kLsq,
                  "[merge] rule 'lsq' needs a fit of every linked layer; got none for layer {}: "
                  "give calibration batches (calibrate), or use merge_method 'input' or 'weight'",
                  chain.layer(n).name);
    if (rule == MergeRule::kProjected) {
      layers.push_back(projected_merge(view, n));
      continue;
    }
    std::vector<double> factors = alpha_star.of(n, layers.data());
    layers.push_back(is_summed ? summed_merge(view, n, rule, std::move(factors))
                               : scaled_merge(view, n, rule, std::move(factors)));
  }
  return layers;
}

}  // namespace detail

FitAnchor fit_anchor(const ChainView& chain, int64_t position) {
  detail::check_view(chain, "calibrate");
  chain.chain.layer(position);  // refuses a position that is none
  const at::Tensor& A = chain.layers[position].A;
  const std::vector<int64_t> reached = chain.chain.reached(position);
  const bool is_summed = chain.chain.shortcut() == Shortcut::kMs;
  const auto by_norms = detail::factors_by_norms(chain, position);
  FitAnchor anchor;
  if (by_norms) anchor.factors = {1};
  for (size_t k = 0; k < reached.size(); ++k) {
    if (!is_summed && by_norms) anchor.factors[0] += (*by_norms)[k];
    const at::Tensor& other = chain.layers[reached[k]].A;
    if (!is_summed || other.sizes() != A.sizes()) continue;
    anchor.others.push_back(other);
    if (by_norms) anchor.factors.push_back((*by_norms)[k]);
  }
  return anchor;
}

}  // namespace reslora
