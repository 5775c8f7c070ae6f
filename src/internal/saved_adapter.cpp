// Reading the files of a folder, which must belong together.
#include "internal/saved_adapter.h"

#include "detail/check.h"
#include "internal/folders.h"

namespace reslora::detail {

SavedAdapter read_folder(const std::string& folder) {
  const std::string config_path = folder + "/" + kConfigName, path = folder + "/" + kWeightsName;
  for (const std::string& needed : {config_path, path})
    TORCH_CHECK(is_file(needed), fmt::format("[load] an adapter's folder must hold {}; got {}",
                                             needed.substr(needed.rfind('/') + 1), folder));
  SavedAdapter saved;
  saved.file = load_adapter(path);
  saved.config = config_from_json(saved.file.config_json, path);
  const ResLoraConfig beside = config_from_json(file_text(config_path), config_path);
  RESLORA_CHECK(config_to_json(beside) == config_to_json(saved.config),
                "[load] {} and {} must agree on every option; got different ones in {}",
                kConfigName, kWeightsName, folder);
  const std::string statistics = folder + "/" + kStatisticsName;
  if (is_file(statistics)) {
    std::map<std::string, at::Tensor> factors;
    for (const ChainRecord& chain : saved.file.chains)
      for (const LayerShape& layer : chain.layers)
        for (const char* suffix : {".reslora_A.weight", ".reslora_B.weight"})
          factors.emplace(layer.name + suffix, saved.file.tensors.at(layer.name + suffix));
    saved.statistics = load_statistics(statistics, tensors_sum(factors));
  }
  return saved;
}

}  // namespace reslora::detail
