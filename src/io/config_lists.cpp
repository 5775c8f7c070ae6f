// What an adapter's config lists beside the options: chains of W^T, and where layers hang.
#include "io/config_lists.h"

#include <fmt/ranges.h>
#include <reslora/adapted_files.h>

#include "core/check.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

constexpr const char* kTransposedKey = "fan_in_fan_out";

/// What the adapter's config lists by layer under a key.
std::map<std::string, std::vector<std::string>> listed(const AdapterFile& adapter,
                                                       const char* wanted) {
  std::map<std::string, std::vector<std::string>> places;
  std::string value;
  try {
    detail::JsonReader config(adapter.config_json, "the adapter's config");
    config.object([&](const std::string& key) {
      value = config.raw();
      if (key != wanted || value == "null") return;
      detail::JsonReader layers(value, wanted);
      layers.object([&](const std::string& layer) {
        layers.array([&] { places[layer].push_back(layers.string()); });
      });
    });
  } catch (const detail::ContentError& error) {
    RESLORA_CHECK(false, "[merge] {} must list names by layer; got {} ({})", wanted,
                  detail::shown(value), error.what());
  }
  return places;
}

}  // namespace

std::vector<std::string> transposed_chains(const AdapterFile& adapter) {
  std::vector<std::string> chains;
  std::string value;
  try {
    detail::JsonReader config(adapter.config_json, "the adapter's config");
    config.object([&](const std::string& key) {
      value = config.raw();
      if (key != kTransposedKey || value == "null" || value == "false") return;
      detail::JsonReader list(value, kTransposedKey);
      list.array([&] { chains.push_back(list.string()); });
    });
  } catch (const detail::ContentError& error) {
    RESLORA_CHECK(false, "[merge] {} must list the chains whose files hold W^T; got {} ({})",
                  kTransposedKey, detail::shown(value), error.what());
  }
  return chains;
}

std::map<std::string, std::vector<std::string>> other_places(const AdapterFile& adapter) {
  return listed(adapter, "other_places");
}

void check_one_place(const AdapterFile& adapter) {
  for (const auto& [layer, paths] : other_places(adapter))
    RESLORA_CHECK(paths.empty(),
                  "[export_lora] a layer of a plain LoRA must hang at one place; got {}, which "
                  "hangs at {} too: merge into the base, or export the loaded model, which knows "
                  "whether a whole block hangs there",
                  layer, fmt::join(paths, ", "));
}

std::map<std::string, std::vector<std::string>> detail::tied_weights(const AdapterFile& adapter) {
  return listed(adapter, "tied_weights");
}

}  // namespace reslora
