/// @file
/// Removing the shortcuts and folding the adapters into the base weights.
///
/// @code{.cpp}
/// reslora::MergePlan plan(views, "input");  // all alpha* are known before any write
/// plan.apply();                             // W <- W*, originals kept on the CPU
/// plan.revert();                            // the exact bits come back
/// @endcode
///
/// Works on views of tensors, never on modules, so that C++ modules and Python's share it. After
/// any rule a layer's adapter is an ordinary low-rank pair, `LayerMerge::A` and `B` with scaling
/// and alpha* folded in fp32; the merged weight is computed in fp32 (fp64 for fp64) and cast once.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>
#include <reslora/merge_rule.h>

#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace reslora {

/// What was decided for one layer: W* = W + B A, and bias* = bias + `bias` after an affine fit.
struct LayerMerge {
  std::string name;                    ///< full module path
  MergeRule rule = MergeRule::kExact;  ///< how the factors were found
  std::vector<double> alpha_star;      ///< one per reached layer, nearest first; empty where unused
  at::Tensor A;                        ///< [R, in] fp32 (fp64 for fp64 adapters)
  at::Tensor B;                        ///< [out, R], scaling and alpha* folded
  at::Tensor bias = {};                ///< [out], what an affine fit adds; undefined elsewhere
  std::optional<double> residual = {};  ///< |s - A' x| / |s| on the rows that A' is solved from
};

/// The singular values of W* - W = B A, largest first, fp64 [R] on the CPU. Cost: an SVD of an
/// R x R matrix. Throws c10::ValueError for factors that do not fit together.
RESLORA_API at::Tensor singular_values(const LayerMerge& layer);

/// All decisions of a merge, and the merge itself; see above.
class RESLORA_API MergePlan {
 public:
  /// Computes every alpha* and factor without touching a weight. `merge_method`: "exact", "lsq",
  /// "projected", "input", "weight", "factored", or "" for the best rule for what is at hand: exact
  /// where it exists, `lsq` where every other layer has a fit, `projected` where every one has sums
  /// of products, `input` where all windows have entries, else `weight` (see
  /// `fell_back_to_weight`). `use_affine` takes the affine form of a fit where there is one and the
  /// layer has a bias; files of plain LoRA cannot hold it. Throws c10::ValueError where a rule
  /// cannot serve a layer, naming it and the way out. Cost: `weight` forms each merged matrix once
  /// (one at a time), the others no matrix.
  MergePlan(const std::vector<ChainView>& chains, const std::string& merge_method,
            bool use_affine = true);
  /// Moves the plan, with the originals that it keeps.
  MergePlan(MergePlan&&) = default;
  /// Moves the plan, with the originals that it keeps.
  MergePlan& operator=(MergePlan&&) = default;

  /// What was decided, layer by layer, chain by chain.
  const std::vector<LayerMerge>& layers() const { return layers_; }
  /// True where no rule was named and neither fits nor norms were there for a better one.
  bool fell_back_to_weight() const { return fell_back_to_weight_; }
  /// True between `apply` and `revert`.
  bool is_applied() const { return is_applied_; }
  /// How many layers, in the order of `layers`, hold W*: neither none nor all of them after an
  /// `apply` without originals that failed on the way.
  int64_t done() const { return static_cast<int64_t>(done_); }

  /// Writes W* into every weight, one matrix in memory at a time. With `keep_originals` the old
  /// bits are copied to the CPU for `revert`. With `safe_merge` every W* is checked for NaN and
  /// infinity before the first weight is written (computes each W* twice), and those of fp16, where
  /// W* may not fit, always are. `progress(done)` is called after each layer; an exception from it,
  /// or any other (out of memory), restores the weights already written where originals are kept.
  /// Without originals they stay, `done` says how many, and a second call goes on behind them.
  /// Throws c10::ValueError when applied twice, for weights that cannot take a sum, and for
  /// `keep_originals` where some are gone.
  void apply(bool keep_originals = true, bool safe_merge = false,
             const std::function<void(int64_t)>& progress = nullptr);

  /// Lets `apply` go on with the tensors that hold the weights and biases now, as `layers`, where
  /// it failed without originals and the model was moved to another device since. Cost: reads all
  /// weights. Throws c10::ValueError for tensors of other values, dtypes or shapes.
  void go_on_with(const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& biases);

  /// Restores the exact bits that `apply` replaced, after which `apply` may be called again.
  /// `weights` and `biases`, as `layers`: the tensors that hold the merged values now, where they
  /// are no longer those of the plan (a model that was moved to a device). Throws c10::ValueError
  /// where no originals were kept, where a tensor has changed its dtype or shape since, and when
  /// called from the `progress` of `apply`.
  void revert(const std::vector<at::Tensor>& weights = {},
              const std::vector<at::Tensor>& biases = {});

 private:
  void check_finite(bool all) const;
  void write(size_t i, bool keep_original);
  void restore();

  std::vector<LayerMerge> layers_;
  std::vector<at::Tensor> weights_;                           // parallel to layers_
  std::vector<at::Tensor> biases_;                            // parallel to layers_
  std::vector<std::pair<at::Tensor, at::Tensor>> originals_;  // CPU copies, as layers_ once applied
  bool fell_back_to_weight_ = false;
  bool is_applied_ = false;
  bool is_running_ = false;        // `apply` writes weights
  size_t done_ = 0;                // layers that hold W*
  std::vector<int64_t> versions_;  // of their weights, once W* was written: see go_on_with
};

/// W* = W + B A of a planned layer in fp32 (fp64 for an fp64 weight), before the one cast that
/// `apply` does; `weight` [out, in] is not changed. Throws c10::ValueError as `apply` does.
RESLORA_API at::Tensor merged_weight(const at::Tensor& weight, const LayerMerge& layer);

}  // namespace reslora
