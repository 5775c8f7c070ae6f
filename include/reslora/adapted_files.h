/// @file
/// The files of a base model as a saved adapter sees them: where its layers lie in them, and what
/// merging changes. `merge_files` and Python's `merge_folder` ask these rules.
///
/// @code{.cpp}
/// const reslora::ModelFiles files({"base/model.safetensors"});
/// const auto adapter = reslora::load_adapter("adapter/adapter_model.safetensors");
/// const reslora::AdaptedFiles adapted(files, adapter);
/// const reslora::MergePlan plan = adapted.plan({}, "weight");
/// files.write("merged.safetensors", files.names(), adapted.edits(plan), {});
/// @endcode
///
/// Files may name a tensor with another prefix than the model does, and may hold W^T: that of the
/// chains which the adapter's config lists in fan_in_fan_out (transformers' Conv1D). A layer that
/// hangs at several places of its model is merged at each of them that the files hold.
#pragma once

#include <c10/core/Device.h>
#include <reslora/adapter_io.h>
#include <reslora/config.h>
#include <reslora/export.h>
#include <reslora/merge.h>
#include <reslora/model_files.h>
#include <reslora/statistics_io.h>

#include <map>
#include <string>
#include <vector>

namespace reslora {

/// Returns the chains whose base files hold W^T. Throws c10::ValueError for a config that does not
/// list them.
RESLORA_API std::vector<std::string> transposed_chains(const AdapterFile& adapter);

/// Returns the further paths of the layers that hang at several places of their model, by layer:
/// what the adapter's config lists in other_places. Throws c10::ValueError for a config that does
/// not list them.
RESLORA_API std::map<std::string, std::vector<std::string>> other_places(
    const AdapterFile& adapter);

/// Throws c10::ValueError where a layer hangs at several places: a plain LoRA adapts one of them.
RESLORA_API void check_one_place(const AdapterFile& adapter);

/// Plans the merge of a saved adapter without its base, for files of plain LoRA. `statistics`: by
/// layer; `merge_method` as in `MergePlan`, empty: the adapter's own, else the best for what is at
/// hand. Throws c10::ValueError where a rule cannot serve (`weight` needs the base), where factors
/// are not finite, and as `check_one_place`.
RESLORA_API MergePlan plan_adapter(const AdapterFile& adapter,
                                   const std::map<std::string, LayerStatistics>& statistics,
                                   const std::string& merge_method,
                                   const ExpressionMatch& match = matches_ecma_script);

/// An adapter in the files of its base; see above. Holds views of the mapped files, reads nothing.
class RESLORA_API AdaptedFiles {
 public:
  /// Finds every layer of `adapter`. Throws c10::ValueError for the base of another adapter: a
  /// layer whose weight is not there, could be one of several tensors, or has another shape or no
  /// floating dtype, and more layers of a chain than the adapter has, where its config means all.
  /// `match` reads the config's regular expressions.
  AdaptedFiles(const ModelFiles& files, const AdapterFile& adapter,
               const ExpressionMatch& match = matches_ecma_script);

  /// As `plan_adapter`, with the base. `use_affine` as in `MergePlan`.
  MergePlan plan(const std::map<std::string, LayerStatistics>& statistics,
                 const std::string& merge_method, bool use_affine = true) const;

  /// What a plan changes, by the files' names of the tensors: the layers' weights, the biases that
  /// an affine fit moves, and trained heads (modules_to_save), cast to the dtype of the tensor they
  /// replace, else to the commonest of the files. B A is computed on `device`. `ties_embeddings`:
  /// the base takes one tensor for its embeddings and its head. What the adapter holds alike for
  /// both (of a resized vocabulary) is written once. Throws c10::ValueError for a head that is tied
  /// in the base, for embeddings of another size, where the adapter holds the base weight of an
  /// adapted head, and it is another, for the bias of an affine fit where the base has none, and
  /// where the adapter's config lists in tied_weights that a layer's weight, or one of a module in
  /// modules_to_save, is another module's too; warns where another head has another shape.
  std::map<std::string, TensorEdit> edits(const MergePlan& plan, bool ties_embeddings = false,
                                          c10::Device device = at::kCPU) const;

 private:
  struct Names {
    std::string weight;
    std::string bias;  // empty: there is none
  };
  struct Place : Names {
    std::vector<Names> copies;  // where the layer hangs at several places of its model
    bool is_transposed = false;
  };

  void find_weights();
  std::vector<Names> names_of(const std::vector<std::string>& paths) const;
  at::Tensor checked_weight(const LayerShape& layer) const;
  bool is_base_of_layer(const std::string& name, const at::Tensor& tensor) const;
  TensorEdit edit_of_head(const std::string& key, const at::Tensor& head) const;

  ModelFiles files_;
  AdapterFile adapter_;
  ResLoraConfig config_;
  std::map<std::string, Place> places_;  // by layer
};

}  // namespace reslora
