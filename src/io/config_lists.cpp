// What an adapter's config lists beside the options: chains of W^T, and where layers hang.
#include "io/config_lists.h"

#include <fmt/ranges.h>
#include <reslora/adapted_files.h>

#include <functional>

#include "core/check.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

constexpr const char* kTransposedKey = "fan_in_fan_out";

/// Lets `read` have the value that the adapter's config has under a key; `rule` is what it must do.
void read_at(const AdapterFile& adapter, const char* wanted, const char* rule,
             const std::function<void(detail::JsonReader&)>& read) {
  std::string value;
  try {
    detail::JsonReader config(adapter.config_json, "the adapter's config");
    config.object([&](const std::string& key) {
      value = config.raw();
      if (key != wanted || value == "null") return;
      detail::JsonReader reader(value, wanted);
      read(reader);
    });
  } catch (const detail::ContentError& error) {
    RESLORA_CHECK(false, "[merge] {} must {}; got {} ({})", wanted, rule, detail::shown(value),
                  error.what());
  }
}

/// What the adapter's config lists by layer under a key.
detail::OtherNames names_at(const AdapterFile& adapter, const char* wanted) {
  detail::OtherNames names;
  read_at(adapter, wanted, "list names by layer", [&](detail::JsonReader& layers) {
    layers.object([&](const std::string& layer) {
      layers.array([&] { names[layer].push_back(layers.string()); });
    });
  });
  return names;
}

}  // namespace

std::vector<std::string> transposed_chains(const AdapterFile& adapter) {
  std::vector<std::string> chains;
  read_at(adapter, kTransposedKey, "list the chains whose files hold W^T",
          [&](detail::JsonReader& list) {
            if (list.peek() == 'f') return;  // false, as PEFT writes it
            list.array([&] { chains.push_back(list.string()); });
          });
  return chains;
}

std::map<std::string, std::vector<std::string>> other_places(const AdapterFile& adapter) {
  return names_at(adapter, detail::kOtherPlaces);
}

void check_one_place(const AdapterFile& adapter) {
  detail::refuse_other_places(other_places(adapter));
}

namespace detail {

OtherNames tied_weights(const AdapterFile& adapter) { return names_at(adapter, kTiedWeights); }

std::string listed(const OtherNames& names) {
  JsonWriter json;
  json.begin_object();
  for (const auto& [name, others] : names) {
    json.key(name).begin_array();
    for (const std::string& other : others) json.string(other);
    json.end_array();
  }
  return json.end_object().text();
}

void refuse_tied(const OtherNames& tied) {
  for (const auto& [name, others] : tied)
    RESLORA_CHECK(others.empty(),
                  "[merge] the weights of adapted layers and of modules_to_save must be their own; "
                  "got those of {}, where {} is the same tensor (an export as plain LoRA leaves "
                  "the base alone)",
                  name, others.front());
}

void refuse_other_places(const OtherNames& places) {
  for (const auto& [layer, paths] : places)
    RESLORA_CHECK(paths.empty(),
                  "[export_lora] a layer of a plain LoRA must hang at one place; got {}, which "
                  "hangs at {} too: merge into the base, or export the loaded model, which knows "
                  "whether a whole block hangs there",
                  layer, fmt::join(paths, ", "));
}

}  // namespace detail
}  // namespace reslora
