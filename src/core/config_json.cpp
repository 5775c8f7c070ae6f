// Options as JSON: one table says how each of them is written and read.
#include <reslora/config_json.h>

#include <functional>
#include <map>
#include <utility>

#include "core/check.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

using detail::ContentError;
using detail::JsonReader;
using detail::JsonWriter;

constexpr const char* kTypeKey = "peft_type";
constexpr const char* kVersionKey = "reslora_version";
constexpr const char* kType = "RESLORA";

// ---- One function for each kind of value -------------------------------------------------------

void write(JsonWriter& json, int64_t value) { json.integer(value); }
void write(JsonWriter& json, double value) { json.number(value); }
void write(JsonWriter& json, bool value) { json.boolean(value); }
void write(JsonWriter& json, const std::string& value) { json.string(value); }

template <typename T>
void write(JsonWriter& json, const std::vector<T>& values) {
  if (values.empty()) {
    json.null();
    return;
  }
  json.begin_array();
  for (const T& value : values) write(json, value);
  json.end_array();
}

template <typename T>
void write(JsonWriter& json, const Patterns<T>& values) {
  json.begin_object();
  for (const auto& [pattern, value] : values) write(json.key(pattern), value);
  json.end_object();
}

void write(JsonWriter& json, const ModuleNames& names) {
  if (names.is_list()) return write(json, names.names());
  if (names.is_given()) return write(json, names.expression());
  json.null();
}

void write(JsonWriter& json, const InitLoraWeights& value) {
  std::visit([&](const auto& own) { write(json, own); }, value);
}

void read(JsonReader& json, int64_t& value) { value = json.integer(); }
void read(JsonReader& json, double& value) { value = json.number(); }
void read(JsonReader& json, bool& value) { value = json.boolean(); }
void read(JsonReader& json, std::string& value) {
  value = json.null() ? std::string() : json.string();
}

template <typename T>
void read(JsonReader& json, std::vector<T>& values) {
  values.clear();
  if (json.null()) return;
  if (json.peek() != '[') return read(json, values.emplace_back());  // one value for a list of it
  json.array([&] { read(json, values.emplace_back()); });
}

template <typename T>
void read(JsonReader& json, Patterns<T>& values) {
  values.clear();
  if (json.null()) return;
  json.object([&](const std::string& pattern) {
    values.emplace_back(pattern, T());
    read(json, values.back().second);
  });
}

void read(JsonReader& json, ModuleNames& names) {
  if (json.null()) {
    names = {};
  } else if (json.peek() == '[') {
    std::vector<std::string> list;
    read(json, list);
    names = ModuleNames(std::move(list));
  } else {
    names = ModuleNames(json.string());
  }
}

void read(JsonReader& json, InitLoraWeights& value) {
  if (json.peek() == '"') {
    value = json.string();
  } else {
    value = json.boolean();
  }
}

// ---- The options by name -----------------------------------------------------------------------

/// Calls visit(name, value) for every option; `Config` is const to write, plain to read.
template <typename Config, typename Visit>
void for_each_option(Config& config, const Visit& visit) {
  visit("r", config.r());
  visit("lora_alpha", config.lora_alpha());
  visit("lora_dropout", config.lora_dropout());
  visit("target_modules", config.target_modules());
  visit("exclude_modules", config.exclude_modules());
  visit("layers_to_transform", config.layers_to_transform());
  visit("layers_pattern", config.layers_pattern());
  visit("rank_pattern", config.rank_pattern());
  visit("alpha_pattern", config.alpha_pattern());
  visit("modules_to_save", config.modules_to_save());
  visit("use_rslora", config.use_rslora());
  visit("init_lora_weights", config.init_lora_weights());
  visit("res_mode", config.res_mode());
  visit("pre_num", config.pre_num());
  visit("merge_method", config.merge_method());
  visit("detach_taps", config.detach_taps());
  visit("norm_window", config.norm_window());
  visit("first_block", config.first_block());
  visit("strict_links", config.strict_links());
}

ResLoraConfig read_config(const std::string& text, const std::string& source) {
  ResLoraConfig config;
  std::map<std::string, std::function<void(JsonReader&)>> readers;
  for_each_option(config, [&](const char* name, auto& value) {
    readers[name] = [&value](JsonReader& json) { read(json, value); };
  });
  JsonReader json(text, source);
  std::string type = kType;
  json.object([&](const std::string& key) {
    if (const auto own = readers.find(key); own != readers.end()) return own->second(json);
    if (key == kTypeKey) {
      type = json.string();
    } else if (key == kVersionKey) {
      json.skip();  // the file's own; the writer gives its own again
    } else {
      config.other_options().emplace_back(key, json.raw());
    }
  });
  json.finish();
  RESLORA_CHECK(type == kType,
                "[config] peft_type must be '{}'; got {} in {} (adapters of another kind are "
                "loaded with PEFT)",
                kType, detail::shown(type), source);
  return config;
}

}  // namespace

std::string config_to_json(const ResLoraConfig& config) {
  JsonWriter json(2);
  try {
    json.begin_object().key(kTypeKey).string(kType).key(kVersionKey).string(RESLORA_VERSION);
    for_each_option(config, [&](const char* name, const auto& value) {
      json.key(name);
      // Python says None where C++ has an empty text.
      if constexpr (std::is_same_v<std::decay_t<decltype(value)>, std::string>) {
        if (value.empty()) return (void)json.null();
      }
      write(json, value);
    });
    for (const auto& [name, value] : config.other_options()) json.key(name).raw(value);
  } catch (const ContentError& error) {
    RESLORA_CHECK(false, "[config] {}", error.what());
  }
  return json.end_object().text() + "\n";
}

ResLoraConfig config_from_json(const std::string& text, const std::string& source,
                               const ExpressionMatch& match) {
  try {
    ResLoraConfig config = read_config(text, source);
    validate(config, match);
    return config;
  } catch (const ContentError& error) {
    RESLORA_CHECK(false, "[config] {}", error.what());
  }
}

}  // namespace reslora
