/// @file
/// Merging a saved adapter into the safetensors files of its base, without building a model.
///
/// @code{.cpp}
/// reslora::merge_files({"base/model-00001-of-00002.safetensors",
///                       "base/model-00002-of-00002.safetensors"},
///                      "adapter", "merged");
/// @endcode
///
/// Tensors are streamed: what the adapter does not change is copied byte by byte, what it changes
/// is summed in fp32 by rows and cast once. Memory: the adapter, and the buffers of a few rows.
/// adapted_files.h says where the layers of an adapter are looked for, and what is refused.
#pragma once

#include <ATen/core/ScalarType.h>
#include <c10/core/Device.h>
#include <reslora/export.h>
#include <reslora/merge.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace reslora {

/// How `merge_files` writes.
struct MergeFilesOptions {
  std::string merge_method = {};  ///< empty: the adapter's own, else the best for what is at hand
  std::optional<at::ScalarType> dtype;         ///< of floating tensors; default: as they are
  std::function<void(int64_t)> progress = {};  ///< called with the bytes written so far
  c10::Device device = at::kCPU;               ///< where B A is computed
  /// The base takes one tensor for its embeddings and its head, so that neither can be replaced
  /// alone; default: what config.json beside the first file says, where there is one.
  std::optional<bool> ties_embeddings = {};
};

/// Writes a merged copy of every file of `base`, under its own name, to `output`, a folder that is
/// made where there is none. `adapter`: a folder that `Adapters::save` or Python's save_pretrained
/// wrote; `lsq` and `input` need its statistics. Trained heads take the place of the base's; one
/// that it has not is added to the last file. Returns what was decided for each layer.
///
/// Throws c10::ValueError, before anything is written, for an adapter of another model (naming the
/// tensor), a rule that cannot serve, and an output file that exists; c10::Error where the system
/// refuses. All files appear, or none. Warns where no statistics lie beside the adapter and so the
/// rule `weight` was taken.
RESLORA_API std::vector<LayerMerge> merge_files(const std::vector<std::string>& base,
                                                const std::string& adapter,
                                                const std::string& output,
                                                const MergeFilesOptions& options = {});

}  // namespace reslora
