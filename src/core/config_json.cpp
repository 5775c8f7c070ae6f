// Options as JSON: how each kind of value is written, read, and named where it is of another kind.
#include <reslora/config_json.h>

#include <functional>
#include <map>
#include <utility>

#include "core/check.h"
#include "core/config_options.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

using detail::ContentError;
using detail::JsonReader;
using detail::JsonWriter;

constexpr const char* kTypeKey = "peft_type";
constexpr const char* kVersionKey = "reslora_version";

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
  const bool may_be_null = value.empty();  // of options whose default is to have none
  value = may_be_null && json.null() ? std::string() : json.string();
}

template <typename T>
void read(JsonReader& json, std::vector<T>& values) {
  values.clear();
  if (json.null()) return;
  if (json.peek() != '[') return read(json, values.emplace_back());  // one value for a list of it
  json.array([&] { read(json, values.emplace_back()); });
  // No layer at all is nobody's wish, and an empty list means all of them here.
  if (std::is_same_v<T, int64_t> && values.empty()) throw ContentError("no index");
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

// ---- What each kind of value is called in a message, after the name of the option ---------------

const char* kind_of(int64_t) { return "be a whole number"; }
const char* kind_of(double) { return "be a number"; }
const char* kind_of(bool) { return "be true or false"; }
const char* kind_of(const std::string&) { return "be a string"; }
const char* kind_of(const std::vector<int64_t>&) { return "be layer indices"; }
const char* kind_of(const std::vector<std::string>&) { return "be a name or a list of names"; }
const char* kind_of(const ModuleNames&) { return "be a list of names or a regular expression"; }
const char* kind_of(const Patterns<int64_t>&) { return "map expressions to whole numbers"; }
const char* kind_of(const Patterns<double>&) { return "map expressions to numbers"; }
const char* kind_of(const InitLoraWeights&) { return "be true, false or 'gaussian'"; }

// ---- The options by name -----------------------------------------------------------------------

/// " in PATH", for the end of a sentence; nothing without a path.
std::string place(const std::string& source) { return source.empty() ? "" : " in " + source; }

/// Reads the value of one option; a value of another kind is one sentence that names the option.
template <typename T>
void read_option(JsonReader& json, const char* name, T& value, const std::string& source) {
  const std::string text = json.raw();
  try {
    JsonReader own(text, name);
    read(own, value);
  } catch (const ContentError&) {
    const std::string quoted = detail::shown(text);
    RESLORA_CHECK(false, "[config] {} must {}; got {}{}", name, kind_of(value),
                  quoted.substr(1, quoted.size() - 2), place(source));
  }
}

/// Writes the value of one option; Python says None where C++ has an empty text.
template <typename T>
void write_option(JsonWriter& json, const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    if (value.empty()) return (void)json.null();
  }
  write(json, value);
}

ResLoraConfig read_config(const std::string& text, const std::string& source) {
  ResLoraConfig config;
  std::map<std::string, std::function<void(JsonReader&)>> readers;
  detail::for_each_option(
      [&](const char* name, auto& value) {
        readers[name] = [&, name](JsonReader& json) { read_option(json, name, value, source); };
      },
      config);
  JsonReader json(text, source.empty() ? "the config" : source);
  std::string type = kPeftType;
  json.object([&](const std::string& key) {
    if (const auto own = readers.find(key); own != readers.end()) return own->second(json);
    if (key == kTypeKey) {
      type = json.peek() == '"' ? json.string() : json.raw();
    } else if (key == kVersionKey || key == kWeightsSumKey) {
      json.skip();  // the file's own; the writer gives its own again
    } else {
      config.other_options().emplace_back(key, json.raw());
    }
  });
  json.finish();
  RESLORA_CHECK(
      type == kPeftType,
      "[config] peft_type must be '{}'; got {}{} (adapters of another kind are loaded with "
      "PEFT)",
      kPeftType, detail::shown(type), place(source));
  return config;
}

}  // namespace

std::string config_to_json(const ResLoraConfig& config) {
  JsonWriter json(2);
  try {
    json.begin_object().key(kTypeKey).string(kPeftType).key(kVersionKey).string(RESLORA_VERSION);
    detail::for_each_option(
        [&](const char* name, const auto& value) { write_option(json.key(name), value); }, config);
    for (const auto& [name, value] : config.other_options()) json.key(name).raw(value);
  } catch (const ContentError& error) {
    RESLORA_CHECK(false, "[config] {}", error.what());
  }
  return json.end_object().text() + "\n";
}

std::vector<OptionInfo> options() {
  std::vector<OptionInfo> list;
  const ResLoraConfig config;
  detail::for_each_option(
      [&](const char* name, const auto& value) {
        JsonWriter json;
        write_option(json, value);
        list.push_back({name, kind_of(value), json.text()});
      },
      config);
  return list;
}

std::string option_json(const ResLoraConfig& config, const std::string& name) {
  JsonWriter json;
  detail::for_each_option(
      [&](const std::string& own, const auto& value) {
        if (own == name) write_option(json, value);
      },
      config);
  RESLORA_CHECK(!json.text().empty(), "[config] there is no option '{}'", name);
  return json.text();
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
