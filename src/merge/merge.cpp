// Plans a merge, applies it to the weights and takes it back; the rules are in merge_rules.cpp.
#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/TensorOperators.h>
#include <c10/core/InferenceMode.h>
#include <reslora/merge.h>

#include <tuple>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "core/precision.h"
#include "core/tensor_checks.h"
#include "merge/merge_rules.h"
#include "merge/merged_weight.h"

namespace reslora {
namespace {

using at::Tensor;

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

/// What one layer adds to a bias that two share would reach the other.
void check_untied_biases(const std::vector<Tensor>& biases, const std::vector<LayerMerge>& layers) {
  std::unordered_map<const void*, size_t> seen;
  for (size_t i = 0; i < biases.size(); ++i) {
    if (!biases[i].defined() || biases[i].numel() == 0) continue;
    const size_t first = seen.emplace(biases[i].const_data_ptr(), i).first->second;
    RESLORA_CHECK(
        first == i || (!layers[first].bias.defined() && !layers[i].bias.defined()),
        "[merge] a layer whose bias is moved by an affine fit must have one of its own; got one "
        "shared by {} and {}: untie them, or plan without use_affine",
        layers[first].name, layers[i].name);
  }
}

/// All that `copy_` may refuse is refused before the first weight is written.
void check_writable(const Tensor& tensor, const std::string& layer) {
  RESLORA_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes &&
                    (!tensor.is_inference() || c10::InferenceMode::is_enabled()),
                "[merge] a weight must be one that can be written; got {}, {} (layer {}): clone it "
                "first",
                detail::described(tensor),
                tensor.is_inference() ? "made in inference mode, outside of it"
                                      : "whose elements share memory",
                layer);
}

/// Counts the writes to a tensor; tensors of inference mode count none.
int64_t version_of(const Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

}  // namespace

at::Tensor singular_values(const LayerMerge& layer) {
  const detail::FullPrecision guard;
  detail::check_pair(layer, "merge");
  // B A = Qb (Rb Ra^T) Qa^T: the singular values are those of the small core.
  const Tensor r_b = std::get<1>(at::linalg_qr(layer.B.to(at::kDouble)));
  const Tensor r_a = std::get<1>(at::linalg_qr(layer.A.to(at::kDouble).t()));
  return at::linalg_svdvals(at::mm(r_b, r_a.t())).cpu();
}

MergePlan::MergePlan(const std::vector<ChainView>& chains, const std::string& merge_method,
                     bool use_affine) {
  const detail::FullPrecision guard;
  for (const ChainView& view : chains) detail::check_view(view);
  const MergeRule rule = detail::choose_rule(chains, merge_method);
  fell_back_to_weight_ = merge_method.empty() && rule == MergeRule::kWeight;
  for (const ChainView& view : chains) {
    for (LayerMerge& layer : detail::plan_chain(view, rule, use_affine)) {
      layers_.push_back(std::move(layer));
    }
    for (const LayerView& layer : view.layers) {
      weights_.push_back(layer.weight);
      biases_.push_back(layer.bias);
    }
  }
}

void MergePlan::apply(bool keep_originals, bool safe_merge,
                      const std::function<void(int64_t)>& progress) {
  RESLORA_CHECK(
      !is_applied_ && !is_running_,
      "[merge] a plan is applied once at a time; got one that is applied: call revert first");
  RESLORA_CHECK(done_ == 0 || !keep_originals,
                "[merge] a merge that failed without originals goes on without them; got "
                "keep_originals with {} of {} layers written",
                done_, layers_.size());
  const detail::FullPrecision guard;
  for (size_t i = done_; i < layers_.size(); ++i) {
    detail::check_weight(weights_[i], layers_[i], "merging");
    detail::check_finite(layers_[i], "merge");
    check_writable(weights_[i], layers_[i].name);
    if (layers_[i].bias.defined()) check_writable(biases_[i], layers_[i].name);
  }
  check_untied(weights_, layers_);
  check_untied_biases(biases_, layers_);
  check_finite(/*all=*/safe_merge);
  try {
    is_running_ = true;
    while (done_ < layers_.size()) {
      write(done_, keep_originals);
      ++done_;
      if (progress) progress(done());
    }
    is_running_ = false;
  } catch (...) {
    is_running_ = false;
    if (keep_originals) restore();
    throw;
  }
  is_applied_ = true;
}

/// Of weights that are not `all` in question, those of fp16, whose range is small.
void MergePlan::check_finite(bool all) const {
  for (size_t i = done_; i < layers_.size(); ++i) {
    if (!all && weights_[i].scalar_type() != at::kHalf) continue;
    const Tensor merged = detail::unchecked_merged_weight(weights_[i], layers_[i]);
    const Tensor& bias = layers_[i].bias;
    RESLORA_CHECK(detail::is_finite(merged.to(weights_[i].scalar_type())) &&
                      (!bias.defined() || detail::is_finite(bias)),
                  "[merge] merged weights must be finite and fit into their dtype; got NaN or "
                  "infinity in {} (layer {}): nothing was written",
                  c10::toString(weights_[i].scalar_type()), layers_[i].name);
  }
}

void MergePlan::write(size_t i, bool keep_original) {
  const Tensor merged = detail::unchecked_merged_weight(weights_[i], layers_[i]);
  const bool has_bias = layers_[i].bias.defined();
  Tensor bias;
  if (has_bias) bias = biases_[i].to(layers_[i].bias.options()) + layers_[i].bias;
  if (keep_original) {
    const auto on_cpu = [](const Tensor& tensor) {
      return tensor.detach().to(at::TensorOptions().device(at::kCPU), /*non_blocking=*/false,
                                /*copy=*/true, at::MemoryFormat::Contiguous);
    };
    originals_.push_back({on_cpu(weights_[i]), has_bias ? on_cpu(biases_[i]) : Tensor()});
  }
  // All memory is there: what follows writes the layer whole.
  weights_[i].copy_(merged);
  if (has_bias) biases_[i].copy_(bias);
  versions_.resize(i);
  versions_.push_back(version_of(weights_[i]));
}

void MergePlan::restore() {
  for (size_t i = 0; i < originals_.size(); ++i) {
    weights_[i].copy_(originals_[i].first);
    if (originals_[i].second.defined()) biases_[i].copy_(originals_[i].second);
  }
  originals_.clear();
  is_applied_ = false;
  done_ = 0;
}

void MergePlan::go_on_with(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  RESLORA_CHECK(weights.size() == layers_.size() && biases.size() == layers_.size(),
                "[merge] going on needs one weight and one bias for each layer; got {} and {} for "
                "{} layers",
                weights.size(), biases.size(), layers_.size());
  const auto check = [&](const Tensor& now, const Tensor& then, size_t i) {
    if (!now.defined() && !then.defined()) return;
    RESLORA_CHECK(now.defined() && then.defined() && detail::is_dense(now) && !now.is_meta() &&
                      now.scalar_type() == then.scalar_type() && now.sizes() == then.sizes() &&
                      at::equal(now.to(then.device()), then),
                  "[merge] the weights of a merge that goes on must be as it left them, on any "
                  "device; got {} where it left {} (layer {}): load the base model again",
                  detail::described(now), detail::described(then), layers_[i].name);
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    check(weights[i], weights_[i], i);
    check(biases[i], biases_[i], i);
    RESLORA_CHECK(i >= done_ || version_of(weights_[i]) == versions_[i],
                  "[merge] layers that hold W* must not be written to before their merge goes on; "
                  "got other values in {}: load the base model again",
                  layers_[i].name);
  }
  for (size_t i = 0; i < done_; ++i) versions_[i] = version_of(weights[i]);
  weights_ = weights;
  biases_ = biases;
}

void MergePlan::revert(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  RESLORA_CHECK(!is_running_,
                "[merge] a plan is reverted once it is applied; got a call from its progress, "
                "while weights are written");
  RESLORA_CHECK(is_applied_,
                "[merge] only an applied plan can be reverted; got one that is not: "
                "call apply first");
  RESLORA_CHECK(originals_.size() == layers_.size(),
                "[merge] reverting needs the originals, which were not kept: apply with "
                "keep_originals, or load the base model again");
  const std::vector<Tensor>& live = weights.empty() ? weights_ : weights;
  const std::vector<Tensor>& live_biases = biases.empty() ? biases_ : biases;
  RESLORA_CHECK(live.size() == layers_.size() && live_biases.size() == layers_.size(),
                "[merge] reverting needs one weight and one bias for each layer; got {} and {} "
                "for {} layers",
                live.size(), live_biases.size(), layers_.size());
  const auto check = [&](const Tensor& now, const Tensor& then, size_t i) {
    if (!then.defined()) return;
    RESLORA_CHECK(detail::is_dense(now) && !now.is_meta() &&
                      now.scalar_type() == then.scalar_type() && now.sizes() == then.sizes(),
                  "[merge] a merged weight must keep its dtype and shape until it is reverted; got "
                  "{} for {} (layer {}): cast the model back first, or load the base model again",
                  detail::described(now), detail::described(then), layers_[i].name);
  };
  for (size_t i = 0; i < originals_.size(); ++i) {
    check(live[i], originals_[i].first, i);
    check(live_biases[i], originals_[i].second, i);
  }
  weights_ = live;
  biases_ = live_biases;
  const detail::FullPrecision guard;
  restore();
}

at::Tensor merged_weight(const at::Tensor& weight, const LayerMerge& layer) {
  const detail::FullPrecision guard;
  detail::check_weight(weight, layer, "merging");
  return detail::unchecked_merged_weight(weight, layer);
}

}  // namespace reslora
