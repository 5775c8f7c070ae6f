// Tensors in and out of safetensors files, and the adapter format on top; see adapter_io.h.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/matching.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <utility>

#include "io/factor_names.h"
#include "io/tensor_types.h"
#include "io/unfinished.h"
#include "safetensors/json.h"
#include "safetensors/safetensors.h"
#include "safetensors/sha256.h"

namespace reslora {
namespace {

using detail::ContentError;
using detail::entry_of;
using detail::file_order;
using detail::on_file;
using detail::require;
using detail::shown;

using Metadata = std::map<std::string, std::string>;

constexpr const char* kFormatKey = "reslora.format";
constexpr const char* kVersionKey = "reslora.version";
constexpr const char* kConfigKey = "reslora.config";
constexpr const char* kChainsKey = "reslora.chains";
constexpr const char* kSumKey = "reslora.sha256";

// PEFT's path to the model inside its wrapper: PEFT reads keys that begin with it as they are.

using Tensors = std::map<std::string, at::Tensor>;

Tensors with_prefix(const Tensors& tensors) {
  Tensors named;
  for (const auto& [name, tensor] : tensors)
    named.emplace(std::string(kModelPrefix) + name, tensor);
  return named;
}

// Takes the prefix off, where all names have it.
Tensors without_prefix(Tensors tensors) {
  const bool has_it = std::all_of(tensors.begin(), tensors.end(), [](const auto& item) {
    return item.first.compare(0, kModelPrefix.size(), kModelPrefix) == 0;
  });
  if (!has_it) return tensors;
  Tensors named;
  for (auto& [name, tensor] : tensors)
    named.emplace(name.substr(kModelPrefix.size()), std::move(tensor));
  return named;
}

void write_file(const std::string& path, const TensorFile& file) {
  detail::Header header;
  header.metadata = file.metadata;
  for (const auto& [name, tensor] : file.tensors) {
    header.tensors.push_back(entry_of(name, tensor));
  }
  detail::assign_spans_(header);
  const std::string front = detail::serialize_header(header);
  detail::AtomicFile out(path);
  out.write(front.data(), front.size());
  for (const detail::TensorEntry& entry : header.tensors) {
    const at::Tensor data = file_order(file.tensors.at(entry.name));
    out.write(data.const_data_ptr(), entry.size());
  }
  out.commit(/*syncs_folder=*/!detail::is_staged(path));
}

// Other bytes than 0 and 1 would be undefined behaviour wherever the tensor is used.
void check_bools(const std::string& name, const at::Tensor& tensor) {
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  const bool is_clean = std::all_of(bytes, bytes + tensor.numel(), [](auto b) { return b <= 1; });
  require(is_clean, "tensor {} of BOOL must have bytes 0 and 1 only; got another", shown(name));
}

// `check` sees the metadata before any tensor is read.
TensorFile read_file(const std::string& path,
                     const std::function<void(const Metadata&)>& check = nullptr) {
  detail::InputFile input(path);
  detail::Header header = detail::read_header(input);
  TensorFile file;
  file.metadata = std::move(header.metadata);
  if (check) check(file.metadata);
  for (const detail::TensorEntry& entry : header.tensors) {
    const auto options =
        at::TensorOptions().dtype(detail::scalar_type(entry.dtype)).device(at::kCPU);
    at::Tensor tensor = at::empty(entry.shape, options);
    input.read(tensor.mutable_data_ptr(), entry.size());
    if (entry.dtype == detail::Dtype::kBool) check_bools(entry.name, tensor);
    file.tensors.emplace(entry.name, std::move(tensor));
  }
  return file;
}

std::string chains_json(const std::vector<ChainRecord>& chains) {
  detail::JsonWriter json;
  json.begin_array();
  for (const ChainRecord& chain : chains) {
    json.begin_object().key("name").string(chain.name).key("layers").begin_array();
    for (const LayerShape& layer : chain.layers) {
      json.begin_object().key("name").string(layer.name).key("in").integer(layer.in_features);
      json.key("out").integer(layer.out_features).key("r").integer(layer.r);
      json.key("scaling").number(layer.scaling);
      if (!layer.left_out.empty()) {
        json.key("left_out").begin_array();
        for (const int64_t position : layer.left_out) json.integer(position);
        json.end_array();
      }
      json.end_object();
    }
    json.end_array().end_object();
  }
  return json.end_array().text();
}

// Calls `member` for the keys of an object, which must be exactly `keys`, and perhaps `extra`.
void read_exactly(detail::JsonReader& reader, const std::vector<std::string>& keys,
                  const std::function<void(const std::string&)>& member,
                  const std::string& extra = "") {
  size_t found = 0;
  reader.object([&](const std::string& key) {
    const bool is_extra = !extra.empty() && key == extra;
    require(is_extra || std::find(keys.begin(), keys.end(), key) != keys.end(),
            "{} must have the keys {}; got {}", kChainsKey, fmt::join(keys, ", "), shown(key));
    member(key);
    if (!is_extra) ++found;
  });
  require(found == keys.size(), "{} must have the keys {}; got {} of them", kChainsKey,
          fmt::join(keys, ", "), found);
}

LayerShape read_layer(detail::JsonReader& reader) {
  LayerShape layer;
  const auto member = [&](const std::string& key) {
    if (key == "name") layer.name = reader.string();
    if (key == "in") layer.in_features = reader.integer();
    if (key == "out") layer.out_features = reader.integer();
    if (key == "r") layer.r = reader.integer();
    if (key == "scaling") layer.scaling = reader.number();
    if (key == "left_out") reader.array([&] { layer.left_out.push_back(reader.integer()); });
  };
  read_exactly(reader, {"name", "in", "out", "r", "scaling"}, member, "left_out");
  return layer;
}

std::vector<ChainRecord> read_chains(const std::string& json) {
  std::vector<ChainRecord> chains;
  detail::JsonReader reader(json, kChainsKey);
  reader.array([&] {
    ChainRecord& chain = chains.emplace_back();
    read_exactly(reader, {"name", "layers"}, [&](const std::string& key) {
      if (key == "name") chain.name = reader.string();
      if (key == "layers") reader.array([&] { chain.layers.push_back(read_layer(reader)); });
    });
  });
  reader.finish();
  return chains;
}

void check_factor(const AdapterFile& adapter, const std::string& key, int64_t rows,
                  int64_t columns) {
  const auto found = adapter.tensors.find(key);
  require(found != adapter.tensors.end(), "the chains name a layer whose tensor {} is missing",
          shown(key));
  const at::Tensor& tensor = found->second;
  require(tensor.defined() && at::isFloatingType(tensor.scalar_type()) &&
              tensor.sizes() == at::IntArrayRef({rows, columns}),
          "tensor {} must be floating point [{}, {}], as the chains say; got {} {}", shown(key),
          rows, columns, tensor.defined() ? c10::toString(tensor.scalar_type()) : "none",
          tensor.defined() ? c10::str(tensor.sizes()) : "");
}

void check_left_out(const LayerShape& layer, int64_t position) {
  for (const int64_t other : layer.left_out)
    require(other >= 0 && other < position,
            "layer {} may leave out layers before it; got left_out {} at position {}",
            shown(layer.name), other, position);
}

// One rule for what is saved and what is loaded: exactly the A and B that the chains name.
void check_adapter(const AdapterFile& adapter) {
  detail::JsonReader config(adapter.config_json, kConfigKey);
  config.object([&](const std::string&) { config.skip(); });
  config.finish();
  std::set<std::string> names;
  std::set<std::string> factors;
  for (const ChainRecord& chain : adapter.chains) {
    require(names.insert(chain.name).second, "chains must have names of their own; got {} twice",
            shown(chain.name));
    require(!chain.layers.empty(), "chain {} must have a layer; got none", shown(chain.name));
    int64_t position = 0;
    for (const LayerShape& layer : chain.layers) {
      check_left_out(layer, position++);
      require(layer.in_features > 0 && layer.out_features > 0 && layer.r > 0 &&
                  std::isfinite(layer.scaling),
              "layer {} must have in, out, r >= 1 and a finite scaling; got in {}, out {}, r {}, "
              "scaling {}",
              shown(layer.name), layer.in_features, layer.out_features, layer.r, layer.scaling);
      const std::string a = key_of_a(layer.name);
      const std::string b = key_of_b(layer.name);
      require(factors.insert(a).second, "layer {} must be in one chain, once", shown(layer.name));
      factors.insert(b);
      check_factor(adapter, a, layer.r, layer.in_features);
      check_factor(adapter, b, layer.out_features, layer.r);
    }
  }
  require(!factors.empty(), "an adapter must have a chain; got none");
  for (const auto& [name, tensor] : adapter.tensors) {
    require(!is_factor(name) || factors.count(name) > 0,
            "tensor {} belongs to a layer that no chain names", shown(name));
  }
}

// A saved adapter that changes nothing is mostly one that was saved before its training.
void warn_if_idle(const std::string& path, const AdapterFile& adapter) {
  const bool is_idle = std::all_of(adapter.tensors.begin(), adapter.tensors.end(), [](auto& pair) {
    if (!detail::ends_with(pair.first, detail::kSuffixB)) return true;
    const auto* bytes = static_cast<const unsigned char*>(pair.second.const_data_ptr());
    return std::all_of(bytes, bytes + pair.second.nbytes(), [](auto b) { return b == 0; });
  });
  if (is_idle) {
    TORCH_WARN("[load_adapter] ", shown(path, 4096),
               ": every B is zero, so this adapter changes nothing; was it saved before training?");
  }
}

void hash_text(detail::Sha256& hash, std::string_view text) {
  const std::string length = std::to_string(text.size()) + ":";
  hash.update(length.data(), length.size());
  hash.update(text.data(), text.size());
}

// The sum of everything that has a meaning, in the order of the names: a file that another program
// has read and written again keeps it, whatever order its data has then.
std::string checksum(const std::string& config, const std::string& chains,
                     const std::map<std::string, at::Tensor>& tensors) {
  detail::Sha256 hash;
  hash_text(hash, config);
  hash_text(hash, chains);
  for (const auto& [name, tensor] : tensors) {
    const detail::TensorEntry entry = entry_of(name, tensor);
    hash_text(hash, name);
    hash_text(hash, detail::dtype_name(entry.dtype));
    hash_text(hash, fmt::format("{}", fmt::join(entry.shape, ",")));
    const at::Tensor data = file_order(tensor);
    hash.update(data.const_data_ptr(), data.nbytes());
  }
  return hash.finish();
}

// The oldest format that can say what the chains hold, so that older versions read what they can.
int64_t format_of(const std::vector<ChainRecord>& chains) {
  for (const ChainRecord& chain : chains)
    for (const LayerShape& layer : chain.layers)
      if (!layer.left_out.empty()) return kAdapterFormat;
  return 1;
}

void check_format(const Metadata& metadata) {
  const auto found = metadata.find(kFormatKey);
  require(
      found != metadata.end(),
      "is not an unmerged reslora adapter, since its metadata has no {}: read a plain LoRA file "
      "with PEFT (PeftModel.from_pretrained), any safetensors file with load_tensors",
      kFormatKey);
  const std::string& text = found->second;
  require(!text.empty() && text.size() < 10 &&
              text.find_first_not_of("0123456789") == std::string::npos,
          "{} must be a number; got {}", kFormatKey, shown(text));
  const int64_t format = std::stoll(text);
  const auto writer = metadata.find(kVersionKey);
  require(format >= 1 && format <= kAdapterFormat,
          "reslora {} reads adapter formats 1 to {}; got format {}, written by reslora {}: install "
          "that version or a later one",
          RESLORA_VERSION, kAdapterFormat, format,
          writer == metadata.end() ? "of unknown version" : shown(writer->second));
  for (const char* key : {kConfigKey, kChainsKey, kSumKey}) {
    require(metadata.count(key) > 0, "the metadata must have {}; got none", key);
  }
}

}  // namespace

TensorFile load_tensors(const std::string& path) {
  return on_file("load_tensors", path, [&] { return read_file(path); });
}

void save_tensors(const std::string& path, const TensorFile& file) {
  on_file("save_tensors", path, [&] { write_file(path, file); });
}

std::string save_adapter(const std::string& path, const AdapterFile& adapter) {
  return on_file("save_adapter", path, [&] {
    check_adapter(adapter);
    TensorFile file;
    file.tensors = with_prefix(adapter.tensors);
    const std::string chains = chains_json(adapter.chains);
    const std::string sum = checksum(adapter.config_json, chains, adapter.tensors);
    file.metadata = {{"format", "pt"},  // what readers of the safetensors package look for
                     {kFormatKey, std::to_string(format_of(adapter.chains))},
                     {kVersionKey, RESLORA_VERSION},
                     {kConfigKey, adapter.config_json},
                     {kChainsKey, chains},
                     {kSumKey, sum}};
    write_file(path, file);
    return sum;
  });
}

namespace {

/// Takes the parts of wrappers out of the names.
void use_plain_names(AdapterFile& adapter) {
  std::map<std::string, at::Tensor> tensors;
  bool is_plain = true;
  for (const auto& [key, tensor] : adapter.tensors) {
    std::string name = plain_name(key);
    is_plain = is_plain && name == key;
    require(tensors.emplace(std::move(name), tensor).second,
            "names must differ without the parts of wrappers; got {} twice", plain_name(key));
  }
  if (is_plain) return;
  adapter.former_sum = detail::sum_of_factors(adapter.tensors);
  adapter.tensors = std::move(tensors);
  for (ChainRecord& chain : adapter.chains) {
    chain.name = plain_name(chain.name);
    for (LayerShape& layer : chain.layers) layer.name = plain_name(layer.name);
  }
}

}  // namespace

AdapterFile load_adapter(const std::string& path) {
  return on_file("load_adapter", path, [&] {
    TensorFile file = read_file(path, check_format);
    file.tensors = without_prefix(std::move(file.tensors));
    const std::string& config = file.metadata.at(kConfigKey);
    const std::string& chains = file.metadata.at(kChainsKey);
    require(
        checksum(config, chains, file.tensors) == file.metadata.at(kSumKey),
        "the content must have the checksum that {} gives; got another, so the file was damaged "
        "or altered: copy or save it again",
        kSumKey);
    AdapterFile adapter;
    adapter.config_json = config;
    adapter.sum = file.metadata.at(kSumKey);
    adapter.chains = read_chains(chains);
    adapter.tensors = std::move(file.tensors);
    check_adapter(adapter);
    use_plain_names(adapter);
    warn_if_idle(path, adapter);
    return adapter;
  });
}

std::string sum_in_header(const std::string& path) {
  return on_file("load_adapter", path, [&] {
    detail::InputFile input(path);
    const detail::Header header = detail::read_header(input);
    const auto found = header.metadata.find(kSumKey);
    return found == header.metadata.end() ? std::string() : found->second;
  });
}

std::string detail::sum_of_factors(const std::map<std::string, at::Tensor>& tensors) {
  std::map<std::string, at::Tensor> factors;
  for (const auto& [key, tensor] : tensors)
    if (is_factor(key)) factors.emplace(key, tensor);
  return tensors_sum(factors);
}

std::string tensors_sum(const std::map<std::string, at::Tensor>& tensors) {
  try {
    return checksum("", "", tensors);
  } catch (const ContentError& error) {
    C10_THROW_ERROR(ValueError, fmt::format("[tensors_sum] {}", error.what()));
  }
}

}  // namespace reslora
