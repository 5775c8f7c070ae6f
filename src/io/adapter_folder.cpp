// Names and keys of an adapter's files, and reading a folder whose files must belong together.
#include <ATen/Functions.h>
#include <reslora/adapter_folder.h>
#include <reslora/config_json.h>
#include <reslora/matching.h>

#include <algorithm>
#include <iterator>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "io/factor_names.h"
#include "io/folders.h"
#include "io/tensor_types.h"
#include "io/unfinished.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

constexpr const char* kRevision = "revision";
constexpr size_t kNamed = 3;  // keys in a sentence

/// The keys of `a` that are not in `b`.
std::vector<std::string> keys_without(const std::map<std::string, at::Tensor>& a,
                                      const std::map<std::string, at::Tensor>& b) {
  std::vector<std::string> keys;
  for (const auto& item : a)
    if (b.count(item.first) == 0) keys.push_back(item.first);
  return keys;
}

/// Replaces the base's revision by that of the other options.
void take_revision(Patterns<std::string>& options, const Patterns<std::string>& others) {
  const auto is_revision = [](const auto& option) { return option.first == kRevision; };
  options.erase(std::remove_if(options.begin(), options.end(), is_revision), options.end());
  std::copy_if(others.begin(), others.end(), std::back_inserter(options), is_revision);
}

/// A JSON object with one more member.
std::string with_sum(const std::string& json, const std::string& sum) {
  const size_t end = json.rfind('}');
  const size_t last = end == std::string::npos || end == 0 ? std::string::npos
                                                           : json.find_last_not_of(" \n", end - 1);
  if (last == std::string::npos) return json;
  const char* comma = json[last] == '{' ? "" : ",";
  return json.substr(0, last + 1) +
         fmt::format("{}\n  \"{}\": \"{}\"\n}}\n", comma, kWeightsSumKey, sum);
}

/// The sum of the weights that options were saved with; empty where they do not say.
std::string sum_in(const std::string& json) {
  std::string sum;
  detail::JsonReader reader(json, kConfigName);
  reader.object([&](const std::string& key) {
    if (key == kWeightsSumKey && reader.peek() == '"') {
      sum = reader.string();
    } else {
      reader.skip();
    }
  });
  return sum;
}

/// The options that lie beside weights of this sum: those that were saved with them, or those that
/// do not say with which. None where they are of another save.
std::optional<ResLoraConfig> options_beside(const std::string& folder, const std::string& sum,
                                            const ExpressionMatch& match) {
  const std::string path = detail::in_folder(folder, kConfigName);
  std::optional<ResLoraConfig> unmarked;
  for (const std::string& place : detail::places_of(folder, kConfigName)) {
    const std::string text = detail::file_text(place);
    if (text.empty()) continue;
    ResLoraConfig config = config_from_json(text, path, match);
    const std::string own = sum_in(text);
    if (own == sum) return config;
    if (own.empty() && place == path) unmarked = std::move(config);
  }
  if (!unmarked && detail::is_file(path))
    TORCH_WARN("[load] ", detail::shown(path, 4096), " was saved with other weights than ",
               kWeightsName, ", which has options of its own: these are used");
  return unmarked;
}

std::string counted(const std::vector<std::string>& keys) {
  const auto end = keys.begin() + static_cast<int64_t>(std::min(keys.size(), kNamed));
  return fmt::format("{} ({})", keys.size(),
                     fmt::join(std::vector<std::string>(keys.begin(), end), ", "));
}

}  // namespace

std::string key_of_a(const std::string& layer) { return layer + std::string(detail::kSuffixA); }

std::string key_of_b(const std::string& layer) { return layer + std::string(detail::kSuffixB); }

bool is_factor(std::string_view key) {
  return detail::ends_with(key, detail::kSuffixA) || detail::ends_with(key, detail::kSuffixB);
}

AdapterFile load_adapter_folder(const std::string& folder, const ExpressionMatch& match) {
  const std::string path = detail::in_folder(folder, kWeightsName);
  detail::finish_dead_if_possible(folder);
  const auto demand = [&](const char* name, const std::vector<std::string>& places) {
    TORCH_CHECK(std::any_of(places.begin(), places.end(), detail::is_file),
                fmt::format("[load] an adapter's folder must hold {}; got {}", name,
                            folder.empty() ? "." : folder));
  };
  demand(kConfigName, detail::places_of(folder, kConfigName));
  demand(kWeightsName, {path});
  AdapterFile adapter = load_adapter(path);
  ResLoraConfig config = config_from_json(adapter.config_json, path, match);
  if (const auto beside = options_beside(folder, adapter.sum, match)) {
    ResLoraConfig same = *beside;
    same.other_options() = config.other_options();
    if (const std::string name = first_difference(config, same); !name.empty())
      RESLORA_CHECK(false, "[load] {} and {} must agree on {}; got {} and {} in {}", kConfigName,
                    kWeightsName, name, option_json(*beside, name), option_json(config, name),
                    folder);
    take_revision(config.other_options(), beside->other_options());
  }
  adapter.config_json = config_to_json(config);
  return adapter;
}

void stage_adapter(Stage& stage, const AdapterFile& adapter,
                   const std::map<std::string, LayerStatistics>& statistics) {
  const std::string sum = save_adapter(stage.path(kWeightsName), adapter);
  if (statistics.empty()) {
    stage.remove(kStatisticsName);  // those of another adapter
  } else {
    const std::string of_factors = detail::sum_of_factors(adapter.tensors);
    save_statistics(stage.path(kStatisticsName), of_factors, statistics, sum);
  }
  write_text(stage.path(kConfigName), with_sum(adapter.config_json, sum));
}

void check_formula(const ResLoraConfig& model, const ResLoraConfig& file) {
  const std::string name = formula_difference(model, file);
  if (name.empty()) return;
  RESLORA_CHECK(false, "[load] model and file must agree on {}; got {} and {}", name,
                option_json(model, name), option_json(file, name));
}

void check_ranks(const ResLoraConfig& config, const std::vector<ChainRecord>& chains,
                 const ExpressionMatch& match) {
  for (const ChainRecord& chain : chains)
    for (const LayerShape& layer : chain.layers) {
      const RankAndScaling own = rank_and_scaling(config, layer.name, match);
      RESLORA_CHECK(own.r == layer.r && own.scaling == layer.scaling,
                    "[load] options and chains must agree on a layer's r and scaling; got {} and "
                    "{} by the options for {}",
                    own.r, own.scaling, shown(layer));
    }
}

void check_tensors(const std::map<std::string, at::Tensor>& model,
                   const std::map<std::string, at::Tensor>& file) {
  const std::vector<std::string> missing = keys_without(model, file);
  const std::vector<std::string> unexpected = keys_without(file, model);
  RESLORA_CHECK(missing.empty() && unexpected.empty(),
                "[load] keys must fit the model; got {} missing and {} unexpected{}",
                counted(missing), counted(unexpected),
                missing.empty() ? " (PeftModel.from_pretrained reads what PEFT has added)" : "");
  for (const auto& [key, tensor] : model)
    RESLORA_CHECK(
        tensor.defined() && file.at(key).defined() && file.at(key).sizes() == tensor.sizes(),
        "[load] shapes must fit the model; got {} for {}, which is {}",
        detail::described(file.at(key)), key, detail::described(tensor));
}

void check_head(const std::string& key, const at::Tensor& head) try {
  const bool is_meta = head.defined() && head.is_meta();
  detail::entry_of(key, is_meta ? at::empty_like(head, at::kCPU) : head);
} catch (const detail::ContentError& error) {
  RESLORA_CHECK(false, "[inject] modules_to_save must fit into an adapter's file: {}",
                error.what());
}

}  // namespace reslora
