/// @file
/// Merging on disk: the safetensors files of a model, read where they lie and written changed.
///
/// @code{.cpp}
/// reslora::ModelFiles base({"model-00001-of-00002.safetensors",
///                           "model-00002-of-00002.safetensors"});
/// auto weight = base.tensor("layers.0.q_proj.weight");  // a view, nothing is read
/// reslora::TensorEdit edit;
/// edit.layer = plan.layers()[0];  // of a MergePlan over such views
/// base.write("out/model-00001-of-00002.safetensors", {"layers.0.q_proj.weight"},
///            {{"layers.0.q_proj.weight", edit}}, {});
/// @endcode
///
/// Files are mapped, not read: a model larger than memory costs the buffers of a few rows. The
/// files must not change meanwhile: `write` refuses then, and `check_unchanged` for what was read
/// of views. Pages that have gone are read as zeros, for which a handler of SIGBUS is installed; it
/// passes on what is not of these files.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/export.h>
#include <reslora/merge.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace reslora {

namespace detail {
class MappedFile;
}

/// What happens to one tensor on its way to the output.
struct TensorEdit {
  std::optional<LayerMerge> layer;        ///< add B A (or, with `is_bias`, the layer's `bias`)
  bool is_transposed = false;             ///< the file holds W^T [in, out], as transformers' Conv1D
  bool is_bias = false;                   ///< add the layer's `bias` instead
  std::optional<at::Tensor> replacement;  ///< take this tensor instead
};

/// How `ModelFiles::write` writes.
struct WriteOptions {
  std::optional<at::ScalarType> dtype;               ///< of floating tensors; default: as they are
  std::map<std::string, std::string> metadata = {};  ///< of the new file
  std::function<void(int64_t)> progress = {};        ///< called with the bytes written so far
};

/// The mapped files of a model; see above.
class RESLORA_API ModelFiles {
 public:
  /// Maps files and checks their headers. Throws c10::ValueError for a malformed file or a tensor
  /// that two of them hold, c10::Error for one that cannot be opened; each names the path.
  explicit ModelFiles(const std::vector<std::string>& paths);

  /// Every tensor's name, in the order of its file.
  const std::vector<std::string>& names() const;
  /// True where a file holds a tensor of this name.
  bool contains(const std::string& name) const { return places_.count(name) > 0; }
  /// The path that holds a tensor, and its metadata. Throw c10::ValueError for an unknown name.
  const std::string& path_of(const std::string& name) const;
  /// The metadata of a file; throws c10::ValueError for an unknown path.
  const std::map<std::string, std::string>& metadata_of(const std::string& path) const;
  /// The tensors of each file by its path, and with those of the last file the edited ones that no
  /// file holds: how a copy of these files is written. Throws c10::ValueError without files.
  std::map<std::string, std::vector<std::string>> names_by_path(
      const std::map<std::string, TensorEdit>& edits) const;
  /// Throws c10::Error where a file was written to, or shortened, since it was mapped: what was
  /// read of it may be wrong.
  void check_unchanged() const;
  /// A tensor as a view of the file; it keeps the map alive. Must not be written to.
  at::Tensor tensor(const std::string& name) const;

  /// Writes some tensors to a new file, atomically, edits applied: sums in fp32 (fp64 for fp64) by
  /// rows, then one cast. Edited tensors that no file holds (replacements) may be among `names`.
  /// Throws c10::ValueError, before the file is made, for edits that do not fit their tensors, that
  /// are of tensors in no file, and of a weight alone where the layer moves its bias too: `edits`
  /// are those of all files; c10::Error where the files were changed meanwhile.
  /// Cost: each tensor is read and written once; memory for 16 MiB of rows.
  void write(const std::string& path, const std::vector<std::string>& names,
             const std::map<std::string, TensorEdit>& edits, const WriteOptions& options) const;

 private:
  struct Place;

  std::vector<std::string> paths_;
  std::vector<std::shared_ptr<const detail::MappedFile>> maps_;  // as paths_
  std::vector<std::string> names_;
  std::map<std::string, std::shared_ptr<const Place>> places_;
  std::map<std::string, std::map<std::string, std::string>> metadata_;
};

}  // namespace reslora
