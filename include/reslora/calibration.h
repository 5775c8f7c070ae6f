/// @file
/// What a calibration decides beside its fits: which rows are padding, and which taps are moved.
///
/// `Adapters::calibrate` and Python's `calibrate` both ask here, so the same model, batches and
/// masks give the same fits. One thing is their own, how far a merged model is from the adapted
/// one: C++ takes the relative squared error of the output, with W* in the weights and in their
/// dtype. Python does so for tensors, without rounding, and takes the KL divergence for outputs
/// with logits. They may therefore decide otherwise where both forms are about as near.
///
/// @code{.cpp}
/// const auto masks = reslora::padding_masks({attention_mask}, "calibrate");
/// const auto kept = reslora::row_mask(masks, x.sizes().slice(0, x.dim() - 1));
/// const reslora::MovedTaps moved = reslora::choose_moves(collector.views(), measure);
/// @endcode
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>
#include <reslora/merge.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace reslora {

/// Fits of every layer, chain by chain; `Fit::A` is undefined where a layer has none.
using Fits = std::vector<std::vector<Fit>>;

/// Checks the padding masks of a batch, each 1 (true) for a token and 0 for padding, and returns
/// them as bool; undefined ones are left out. Throws c10::ValueError in the name of `op` for other
/// values, and for two masks of one shape that differ (an encoder's and a decoder's): whose rows
/// are whose could not be told. Refuses tensors that are not dense, or without values, too.
RESLORA_API std::vector<at::Tensor> padding_masks(const std::vector<at::Tensor>& masks,
                                                  const std::string& op);

/// The first mask that belongs to rows with these leading sizes, flat, if one does: a mask [batch,
/// tokens] belongs to rows [batch, tokens, ...] and [batch * tokens, ...]. Throws c10::ValueError
/// for a mask that is undefined or not dense.
RESLORA_API std::optional<at::Tensor> row_mask(const std::vector<at::Tensor>& masks,
                                               at::IntArrayRef leading);

/// How far rows [rows, columns] are from those of a reference: the squared error of each row,
/// averaged over its columns, in units of the mean square of the reference, summed over rows.
/// Differentiable by autograd. Throws c10::ValueError for tensors of two shapes or no floating
/// dtype.
RESLORA_API at::Tensor error_sum(const at::Tensor& reference, const at::Tensor& other);

/// On how many batches, the first ones, moved taps are tried.
constexpr int64_t kMeasuredBatches = 2;

/// Makes the merge by one of some candidates, numbered from 0.
using PlanOf = std::function<MergePlan(int64_t)>;

/// Returns, for each of `count` candidates, how far the model that is merged by it is from the
/// adapted model, in any unit; an empty vector where outputs cannot be compared. A loader may
/// shuffle: run every batch for all candidates before the next. A plan holds copies of all factors:
/// make it where it is needed.
using MoveMeasure = std::function<std::vector<double>(int64_t count, const PlanOf& plan_of)>;

/// What `choose_moves` decided.
struct MovedTaps {
  Fits fits;                    ///< those to merge by, as the chains and their layers
  std::vector<int64_t> chains;  ///< the chains whose taps were moved
  double before = 0;            ///< the distance without the moves, 0 where there are none
  double after = 0;             ///< and with them
};

/// Moves the taps (`move_taps`) of those chains whose moved form is nearer to the adapted model.
///
/// `chains` have their plain fits. What a chain feeds is not to be seen from its layers, so each
/// linked one is tried by itself, then all that came nearer are tried together. Nothing is moved
/// where outputs cannot be compared, and where a distance that decides is NaN or infinite. Throws
/// c10::ValueError where a linked layer has no fit or tensors do not fit a chain, and what
/// `measure` throws. Cost: `measure` is called for 1 + (linked chains) candidates, and for 2 more.
RESLORA_API MovedTaps choose_moves(const std::vector<ChainView>& chains,
                                   const MoveMeasure& measure);

/// True where the taps of a chain were moved: one of its fits has more rows than the layer's A.
/// Throws c10::ValueError for a view that has not the tensors of every layer.
RESLORA_API bool has_moved_taps(const ChainView& chain);

/// Throws c10::ValueError where fits are of another adapter than `adapter_sum` (`tensors_sum` of A
/// and B) says; `op` begins the sentence, and `way_out` ends it, after "calibrate again, or".
RESLORA_API void check_current(const std::string& fits_sum, const std::string& adapter_sum,
                               const std::string& op, const std::string& way_out);

/// A warning where layers were fitted on fewer rows than they have features, else "". Throws
/// c10::ValueError for a view that has not the tensors of every layer.
RESLORA_API std::string few_rows_warning(const std::vector<ChainView>& chains);

}  // namespace reslora
