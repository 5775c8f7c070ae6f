/// @file
/// The folder of an adapter: what its files and their tensors are called, and reading it.
///
/// @code{.cpp}
/// const reslora::AdapterFile adapter = reslora::load_adapter_folder("adapter");
/// @endcode
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/adapter_io.h>
#include <reslora/config.h>
#include <reslora/export.h>
#include <reslora/module_names.h>
#include <reslora/stage.h>
#include <reslora/statistics_io.h>

#include <map>
#include <string>
#include <string_view>

namespace reslora {

/// The options of the adapter, as in config_json.h.
constexpr const char* kConfigName = "adapter_config.json";
/// Its tensors, as in adapter_io.h.
constexpr const char* kWeightsName = "adapter_model.safetensors";
/// Its norms and fits, as in statistics_io.h; may be absent.
constexpr const char* kStatisticsName = "adapter_statistics.safetensors";
/// What every key begins with in the files of PEFT, and in ours.
constexpr std::string_view kModelPrefix = "base_model.model.";

/// Returns the key of a layer's A.
RESLORA_API std::string key_of_a(const std::string& layer);
/// Returns the key of a layer's B.
RESLORA_API std::string key_of_b(const std::string& layer);
/// True for the key of an A or B; everything else in an adapter's file is of a trained head.
RESLORA_API bool is_factor(std::string_view key);

/// Writes an adapter's files for one commit: weights, statistics (or none, and those in the folder
/// go) and options. The weights decide: the other two note their sum, so that a reader knows which
/// of them belong there. Throws as `save_adapter` and `save_statistics` do.
RESLORA_API void stage_adapter(Stage& stage, const AdapterFile& adapter,
                               const std::map<std::string, LayerStatistics>& statistics = {});

/// Reads and checks a folder that `Adapters::save` or Python's save_pretrained wrote; what a writer
/// that died had begun is finished or removed, where the folder can be written.
///
/// `config_json` is what the weights' file says, but for the base's `revision`: people change it in
/// adapter_config.json by hand, and it changes nothing that the adapter computes. The options of
/// ResLoraConfig must be the same in both files; an adapter_config.json that another save wrote is
/// left out, with a warning. `match` reads the regular expressions. Throws c10::Error where a file
/// is missing, c10::ValueError where files are damaged or do not agree.
RESLORA_API AdapterFile load_adapter_folder(const std::string& folder,
                                            const ExpressionMatch& match = matches_ecma_script);

/// An adapter's folder with all that is in it.
struct SavedAdapter {
  AdapterFile file;                                   ///< weights and chains
  ResLoraConfig config;                               ///< what `file.config_json` says
  std::map<std::string, LayerStatistics> statistics;  ///< by layer; empty where there are none
};

/// Reads a folder as `load_adapter_folder` does, with the statistics that belong to it, and again
/// where another save came between its files. Where that happens ten times, the last weights are
/// returned, whole, and statistics that are not theirs are left out with a warning. Throws as
/// `load_adapter_folder` and `statistics_beside` do.
RESLORA_API SavedAdapter load_saved_adapter(const std::string& folder,
                                            const ExpressionMatch& match = matches_ecma_script);

/// Throws c10::ValueError where options that change what given A and B compute differ between a
/// model and the file that it loads; see `formula_difference`.
RESLORA_API void check_formula(const ResLoraConfig& model, const ResLoraConfig& file);

/// Throws c10::ValueError unless options give the layers of a file's chains the ranks and scalings
/// that these have. Takes no memory for them.
RESLORA_API void check_ranks(const ResLoraConfig& config, const std::vector<ChainRecord>& chains,
                             const ExpressionMatch& match = matches_ecma_script);

/// Throws c10::ValueError unless a file holds exactly the tensors that a model loads, in the same
/// shapes; both by key.
RESLORA_API void check_tensors(const std::map<std::string, at::Tensor>& model,
                               const std::map<std::string, at::Tensor>& file);

/// Throws c10::ValueError for a tensor of modules_to_save that an adapter's file cannot hold
/// (complex, empty, sparse), so that it is refused before the training. One on meta gets its values
/// later. Reads no values.
RESLORA_API void check_head(const std::string& key, const at::Tensor& head);

}  // namespace reslora
