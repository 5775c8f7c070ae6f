// Reading the files of a folder, which must belong together.
#include "io/saved_adapter.h"

#include "core/check.h"
#include "io/folders.h"

namespace reslora::detail {
namespace {

/// Demands that both configs are the same but for the base's revision, a name that people change by
/// hand and that changes nothing which the adapter computes.
void check_same(const ResLoraConfig& in_weights, ResLoraConfig beside, const std::string& folder) {
  beside.other_options() = in_weights.other_options();
  const std::string name = first_difference(in_weights, beside);
  if (name.empty()) return;
  RESLORA_CHECK(false, "[load] {} and {} must agree on {}; got {} and {} in {}", kConfigName,
                kWeightsName, name, option_json(beside, name), option_json(in_weights, name),
                folder);
}

}  // namespace

SavedAdapter read_folder(const std::string& folder) {
  const std::string config_path = folder + "/" + kConfigName, path = folder + "/" + kWeightsName;
  for (const std::string& needed : {config_path, path})
    TORCH_CHECK(is_file(needed), fmt::format("[load] an adapter's folder must hold {}; got {}",
                                             needed.substr(needed.rfind('/') + 1), folder));
  SavedAdapter saved;
  saved.file = load_adapter(path);
  saved.config = config_from_json(saved.file.config_json, path);
  const ResLoraConfig beside = config_from_json(file_text(config_path), config_path);
  check_same(saved.config, beside, folder);
  saved.statistics = statistics_beside(folder, saved.file);
  return saved;
}

}  // namespace reslora::detail
