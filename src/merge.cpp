// Plans a merge (rules, alpha*, factors), applies it to the weights and takes it back.
//
// Planning reads adapters and norms; only the rule `weight` reads base weights, one matrix at a
// time.
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <reslora/formulas.h>
#include <reslora/merge.h>

#include <array>
#include <cmath>
#include <unordered_map>
#include <utility>

#include "detail/check.h"

namespace reslora {
namespace {

using at::Tensor;

constexpr std::array<std::pair<const char*, MergeRule>, 4> kRuleNames = {{
    {"exact", MergeRule::kExact},
    {"input", MergeRule::kInput},
    {"weight", MergeRule::kWeight},
    {"factored", MergeRule::kFactored},
}};

/// Full precision whatever the caller has switched on: no autograd, autocast or TF32.
struct MergeGuard {
  at::NoGradGuard no_grad;
  at::NoTF32Guard no_tf32;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

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

// ---- checks

void check_adapter(const Tensor& tensor, const char* role, int64_t rows, int64_t columns,
                   const std::string& name) {
  RESLORA_CHECK(tensor.defined() && !tensor.is_meta() && at::isFloatingType(tensor.scalar_type()),
                "[merge] {} must be a floating-point tensor in memory; got another one (layer {})",
                role, name);
  RESLORA_CHECK(tensor.sizes() == at::IntArrayRef({rows, columns}),
                "[merge] {} must be [{}, {}]; got [{}] (layer {})", role, rows, columns,
                fmt::join(tensor.sizes(), ", "), name);
}

void check_view(const ChainView& view) {
  RESLORA_CHECK(static_cast<int64_t>(view.layers.size()) == view.chain.size(),
                "[merge] a chain needs the tensors of each of its layers; got {} for {} layers",
                view.layers.size(), view.chain.size());
  for (int64_t n = 0; n < view.chain.size(); ++n) {
    const LayerShape& shape = view.chain.layer(n);
    check_adapter(view.layers[n].A, "A", shape.r, shape.in_features, shape.name);
    check_adapter(view.layers[n].B, "B", shape.out_features, shape.r, shape.name);
  }
}

/// Quantised, sharded and absent weights cannot take a sum. `purpose` says who asks.
void check_weight(const Tensor& weight, const LayerMerge& layer, const char* purpose) {
  RESLORA_CHECK(weight.defined(),
                "[merge] {} needs the base weight, and layer {} has none: give it, or export the "
                "factors by another rule",
                purpose, layer.name);
  const at::ScalarType dtype = weight.scalar_type();
  RESLORA_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "[merge] {} needs a weight of dtype float32, float64, float16 or bfloat16: dequantise "
      "it first; got {} (layer {})",
      purpose, c10::toString(dtype), layer.name);
  RESLORA_CHECK(!weight.is_meta() && weight.layout() == at::kStrided &&
                    !weight.key_set().has(c10::DispatchKey::Python),
                "[merge] {} needs a plain tensor in memory: materialise, gather or dequantise it "
                "first; got {} on {}, maybe of a tensor subclass (layer {})",
                purpose, c10::toString(weight.layout()), weight.device().str(), layer.name);
  RESLORA_CHECK(weight.sizes() == at::IntArrayRef({layer.B.size(0), layer.A.size(1)}),
                "[merge] weight must be [{}, {}]; got [{}] (layer {})", layer.B.size(0),
                layer.A.size(1), fmt::join(weight.sizes(), ", "), layer.name);
}

/// Two layers that share one weight would merge into it twice.
void check_untied(const std::vector<Tensor>& weights, const std::vector<LayerMerge>& layers) {
  std::unordered_map<const void*, size_t> seen;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].numel() == 0) continue;
    const auto [first, is_new] = seen.emplace(weights[i].const_data_ptr(), i);
    RESLORA_CHECK(is_new,
                  "[merge] every layer must have a weight of its own; got one shared by {} and {}: "
                  "untie them, or export the adapter instead",
                  layers[first->second].name, layers[i].name);
  }
}

// ---- merged weights

/// W + B A in fp32 (fp64 for an fp64 weight), on the weight's device: the one temporary matrix.
Tensor merged_weight(const Tensor& weight, const LayerMerge& layer) {
  const at::ScalarType dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor merged = weight.detach().to(dtype, /*non_blocking=*/false, /*copy=*/true);
  return merged.addmm_(layer.B.to(merged.options()), layer.A.to(merged.options()));
}

double norm_of(const Tensor& matrix) {
  // Rows first and their sum in fp64: an fp32 sum over a large matrix would lose digits.
  const Tensor rows = at::linalg_vector_norm(matrix, 2, at::IntArrayRef{1});
  return at::linalg_vector_norm(rows.to(at::kDouble), 2).item<double>();
}

bool is_finite(const Tensor& matrix) {
  if (matrix.numel() == 0) return true;
  const auto [low, high] = at::aminmax(matrix);  // carries NaN, and needs no matrix of flags
  return std::isfinite(low.item<double>()) && std::isfinite(high.item<double>());
}

// ---- alpha* and factors

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
    RESLORA_CHECK(other.in_features == shape.in_features,
                  "[merge] rule '{}' adds A of layer {} to A of layer {}, which needs equal "
                  "in_features; got {} and {}: use merge_method 'input'",
                  merge_rule_name(rule), other.name, shape.name, other.in_features,
                  shape.in_features);
    A.add_(view.layers[reached[k]].A.to(options), alpha_star[k]);
  }
  return {shape.name, rule, std::move(alpha_star), A, view.layers[n].B.to(options) * shape.scaling};
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
    const double norm = norm_of(merged_weight(weight, layer));
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

}  // namespace

MergeRule parse_merge_rule(const std::string& merge_method) {
  for (const auto& [name, rule] : kRuleNames) {
    if (merge_method == name) return rule;
  }
  RESLORA_CHECK(false,
                "[merge] merge_method must be 'input', 'weight', 'factored' or 'exact'; got '{}'",
                merge_method);
}

std::string merge_rule_name(MergeRule rule) {
  for (const auto& [name, value] : kRuleNames) {
    if (rule == value) return name;
  }
  RESLORA_CHECK(false, "[merge] a rule must be one of the four of `MergeRule`; got {}",
                static_cast<int>(rule));
}

MergePlan::MergePlan(const std::vector<ChainView>& chains, const std::string& merge_method) {
  const MergeGuard guard;
  MergeRule rule = merge_method.empty() ? MergeRule::kInput : parse_merge_rule(merge_method);
  for (const ChainView& view : chains) {
    check_view(view);
    if (merge_method.empty() && !has_all_norms(view)) fell_back_to_weight_ = true;
  }
  if (fell_back_to_weight_) rule = MergeRule::kWeight;
  for (const ChainView& view : chains) plan_chain(view, rule);
}

void MergePlan::plan_chain(const ChainView& view, MergeRule rule) {
  const Chain& chain = view.chain;
  const size_t first = layers_.size();
  const bool is_summed = chain.shortcut() == Shortcut::kMs && rule != MergeRule::kInput;
  AlphaStar alpha_star(view, rule);
  for (int64_t n = 0; n < chain.size(); ++n) {
    weights_.push_back(view.layers[n].weight);
    if (chain.merges_exactly(n)) {
      layers_.push_back(exact_merge(view, n));
      continue;
    }
    RESLORA_CHECK(
        rule != MergeRule::kExact,
        "[merge] rule 'exact' serves none, bs and unlinked layers only; got a linked '{}' "
        "layer ({}): use merge_method 'input' or 'weight'",
        shortcut_name(chain.shortcut()), chain.layer(n).name);
    std::vector<double> factors = alpha_star.of(n, layers_.data() + first);
    layers_.push_back(is_summed ? summed_merge(view, n, rule, std::move(factors))
                                : scaled_merge(view, n, rule, std::move(factors)));
  }
}

void MergePlan::apply(bool keep_originals, bool safe_merge,
                      const std::function<void(int64_t)>& progress) {
  RESLORA_CHECK(
      !is_applied_,
      "[merge] a plan is applied once at a time; got one that is applied: call revert first");
  const MergeGuard guard;
  for (size_t i = 0; i < layers_.size(); ++i) check_weight(weights_[i], layers_[i], "merging");
  check_untied(weights_, layers_);
  if (safe_merge) check_finite();
  try {
    for (size_t i = 0; i < layers_.size(); ++i) {
      write(i, keep_originals);
      if (progress) progress(static_cast<int64_t>(i) + 1);
    }
  } catch (...) {
    if (keep_originals) restore();
    throw;
  }
  is_applied_ = true;
}

void MergePlan::check_finite() const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    RESLORA_CHECK(is_finite(merged_weight(weights_[i], layers_[i]).to(weights_[i].scalar_type())),
                  "[merge] safe_merge demands finite merged weights; got NaN or infinity in {} "
                  "(layer {}): nothing was written",
                  c10::toString(weights_[i].scalar_type()), layers_[i].name);
  }
}

void MergePlan::write(size_t i, bool keep_original) {
  const Tensor& weight = weights_[i];
  const Tensor merged = merged_weight(weight, layers_[i]);
  if (keep_original) {
    originals_.push_back(weight.detach().to(at::TensorOptions().device(at::kCPU),
                                            /*non_blocking=*/false, /*copy=*/true,
                                            at::MemoryFormat::Contiguous));
  }
  is_applied_ = true;  // from here on a weight is changed: a second apply would add twice
  weight.copy_(merged);
}

void MergePlan::restore() {
  for (size_t i = 0; i < originals_.size(); ++i) weights_[i].copy_(originals_[i]);
  originals_.clear();
  is_applied_ = false;
}

void MergePlan::revert() {
  RESLORA_CHECK(is_applied_,
                "[merge] only an applied plan can be reverted; got one that is not: "
                "call apply first");
  RESLORA_CHECK(originals_.size() == layers_.size(),
                "[merge] reverting needs the originals, which were not kept: apply with "
                "keep_originals, or load the base model again");
  for (size_t i = 0; i < originals_.size(); ++i) {
    RESLORA_CHECK(weights_[i].scalar_type() == originals_[i].scalar_type(),
                  "[merge] a merged weight must keep its dtype until it is reverted; got {} for {} "
                  "(layer {}): cast the model back first",
                  c10::toString(weights_[i].scalar_type()),
                  c10::toString(originals_[i].scalar_type()), layers_[i].name);
  }
  const MergeGuard guard;
  restore();
}

std::pair<at::Tensor, at::Tensor> padded_factors(const LayerMerge& layer, int64_t R) {
  const int64_t rank = layer.A.size(0);
  RESLORA_CHECK(R >= rank, "[merge] R must be at least the layer's rank {}; got {} (layer {})",
                rank, R, layer.name);
  return {at::constant_pad_nd(layer.A, {0, 0, 0, R - rank}),
          at::constant_pad_nd(layer.B, {0, R - rank})};
}

}  // namespace reslora
