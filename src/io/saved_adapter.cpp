// Reading the files of a folder, which must belong together.
#include "io/saved_adapter.h"

#include <sstream>

#include "core/check.h"
#include "io/folders.h"

namespace reslora::detail {
namespace {

/// Demands that both configs are the same; names the first line where they are not.
void check_equal(const std::string& in_weights, const std::string& beside,
                 const std::string& folder) {
  std::stringstream first(in_weights), second(beside);
  std::string a, b;
  while (std::getline(first, a), std::getline(second, b))
    RESLORA_CHECK(a == b, "[load] {} and {} must agree on every option; got{} and{} in {}",
                  kWeightsName, kConfigName, a, b, folder);
  RESLORA_CHECK(in_weights == beside,
                "[load] {} and {} must agree on every option; they do not in "
                "{}",
                kWeightsName, kConfigName, folder);
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
  check_equal(config_to_json(saved.config), config_to_json(beside), folder);
  saved.statistics = statistics_beside(folder, saved.file);
  return saved;
}

}  // namespace reslora::detail
