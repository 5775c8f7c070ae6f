// Finding an adapter's layers and heads among the tensors of its base's files, and planning on
// views of them.
#include <ATen/Functions.h>
#include <reslora/adapted_files.h>
#include <reslora/adapter_folder.h>
#include <reslora/config_json.h>

#include <algorithm>
#include <array>
#include <functional>
#include <set>
#include <string_view>

#include "core/check.h"
#include "io/config_lists.h"
#include "io/factor_names.h"
#include "merge/merged_weight.h"

namespace reslora {
namespace {

using at::Tensor;
using Statistics = std::map<std::string, LayerStatistics>;
using Paths = std::vector<std::string>;

constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kBaseLayer = ".base_layer.";  // of an adapted layer, as PEFT names it
// Embeddings that transformers ties to a head which the files do not hold.
constexpr std::array<std::string_view, 5> kEmbeddings{{"embed_tokens.weight", "wte.weight",
                                                       "word_embeddings.weight", "shared.weight",
                                                       "embed_in.weight"}};

bool is_embedding(std::string_view name) {
  return std::any_of(kEmbeddings.begin(), kEmbeddings.end(),
                     [&](std::string_view end) { return detail::ends_with(name, end); });
}

/// The name in the files that a model's name stands for, whatever prefix either has; empty where
/// there is none, or several could be meant.
std::string find_name(const ModelFiles& files, const std::string& wanted) {
  if (files.contains(wanted)) return wanted;
  std::string found;
  for (const std::string& name : files.names()) {
    if (!is_or_ends_with(name, wanted) && !is_or_ends_with(wanted, name)) continue;
    if (!found.empty()) return "";
    found = name;
  }
  return found;
}

/// True for the path of a layer of a chain, whose key has `*` where its layers have an index.
bool is_of_chain(std::string_view path, std::string_view key) {
  size_t at = 0;
  for (const char c : key) {
    const size_t first = at;
    if (c == '*') {
      while (at < path.size() && path[at] >= '0' && path[at] <= '9') ++at;
    } else if (at < path.size() && path[at] == c) {
      ++at;
    }
    if (at == first) return false;
  }
  return at == path.size();
}

/// Refuses a base with more layers of a chain than the adapter has, where it should have all.
void check_counts(const ModelFiles& files, const AdapterFile& adapter, const ResLoraConfig& config,
                  const ExpressionMatch& match) {
  if (!config.layers_to_transform().empty() || config.exclude_modules().is_given()) return;
  const ModuleNames& targets = config.target_modules();
  const bool is_named = targets.is_given() && !targets.is_all_linear();  // some, or all of a chain
  Paths further;
  for (const auto& [layer, paths] : other_places(adapter))
    further.insert(further.end(), paths.begin(), paths.end());
  for (const ChainRecord& chain : adapter.chains) {
    const auto is_meant = [&](const std::string& name) {
      if (!detail::ends_with(name, kWeight)) return false;
      const std::string path = name.substr(0, name.size() - kWeight.size());
      return is_of_chain(path, chain.name) && (!is_named || targets.matches(path, match)) &&
             std::find(further.begin(), further.end(), path) == further.end();
    };
    const auto count =
        static_cast<size_t>(std::count_if(files.names().begin(), files.names().end(), is_meant));
    RESLORA_CHECK(count <= chain.layers.size(),
                  "[merge] the base must be that of the adapter; got {} layers {}, of which the "
                  "adapter has {}",
                  count, chain.name, chain.layers.size());
  }
}

std::string sizes_of(const Tensor& tensor) {
  return fmt::format("[{}]", fmt::join(tensor.sizes(), ", "));
}

/// The floating dtype that most tensors of the files have.
at::ScalarType common_dtype(const ModelFiles& files) {
  std::map<at::ScalarType, int64_t> counts;
  at::ScalarType best = at::kFloat;
  for (const std::string& name : files.names()) {
    const at::ScalarType dtype = files.tensor(name).scalar_type();
    if (at::isFloatingType(dtype) && ++counts[dtype] > counts[best]) best = dtype;
  }
  return best;
}

/// The other of an embedding and a head that have the same values in the adapter; empty where there
/// is none. So are input and output embeddings of one tensor, which were resized together.
std::string twin_of(const AdapterFile& adapter, const std::string& name, const Tensor& head) {
  for (const auto& [other, tensor] : adapter.tensors) {
    if (other == name || is_factor(other) || !(is_embedding(name) || is_embedding(other))) continue;
    if (tensor.sizes() == head.sizes() && at::equal(tensor, head)) return other;
  }
  return "";
}

/// Refuses a trained embedding or head of a base that holds one tensor for both.
void refuse_tied(const ModelFiles& files, const std::string& name, const std::string& found,
                 const Tensor& head, bool ties_embeddings) {
  std::string tied;
  if (ties_embeddings && is_embedding(found)) tied = "the output head (tie_word_embeddings)";
  if (found.empty()) {
    const auto& names = files.names();
    const auto other = std::find_if(names.begin(), names.end(), [&](const std::string& key) {
      return is_embedding(key) && files.tensor(key).sizes() == head.sizes();
    });
    if (other != names.end()) tied = *other;
  }
  RESLORA_CHECK(
      tied.empty(),
      "[merge] modules_to_save must be tensors of their own in the base; got {}, tied to {} (in "
      "Python: PeftModel.from_pretrained, merge_and_unload, save_pretrained)",
      name, tied);
}

const Tensor& factor_of(const AdapterFile& adapter, const std::string& key) {
  const auto found = adapter.tensors.find(key);
  RESLORA_CHECK(found != adapter.tensors.end(),
                "[merge] an adapter must hold A and B of every layer; got no {}", key);
  return found->second;
}

/// The plan of an adapter; `add_base`, where there is one, gives a layer's view the base's tensors.
MergePlan plan_of(const AdapterFile& adapter, const ResLoraConfig& config,
                  const Statistics& statistics, const std::string& merge_method,
                  const std::function<void(const LayerShape&, LayerView&)>& add_base,
                  bool use_affine) {
  std::vector<ChainView> views;
  for (const ChainRecord& record : adapter.chains) {
    ChainView& view = views.emplace_back(ChainView{Chain(config, record.layers), {}});
    for (const LayerShape& layer : record.layers) {
      LayerView& own = view.layers.emplace_back();
      own.A = factor_of(adapter, key_of_a(layer.name));
      own.B = factor_of(adapter, key_of_b(layer.name));
      if (add_base) add_base(layer, own);
      const auto known = statistics.find(layer.name);
      if (known == statistics.end()) continue;
      own.norms = known->second.norms;
      own.fit = known->second.fit;
    }
  }
  MergePlan plan(views, merge_method.empty() ? config.merge_method() : merge_method, use_affine);
  for (const LayerMerge& layer : plan.layers()) detail::check_finite(layer, "merge");
  return plan;
}

ResLoraConfig config_of(const AdapterFile& adapter, const ExpressionMatch& match) {
  ResLoraConfig config = config_from_json(adapter.config_json, "the adapter's config", match);
  check_ranks(config, adapter.chains, match);
  return config;
}

}  // namespace

MergePlan plan_adapter(const AdapterFile& adapter, const Statistics& statistics,
                       const std::string& merge_method, const ExpressionMatch& match) {
  check_one_place(adapter);
  return plan_of(adapter, config_of(adapter, match), statistics, merge_method, nullptr,
                 /*use_affine=*/false);
}

AdaptedFiles::AdaptedFiles(const ModelFiles& files, const AdapterFile& adapter,
                           const ExpressionMatch& match)
    : files_(files), adapter_(adapter), config_(config_of(adapter, match)) {
  check_counts(files_, adapter_, config_, match);
  find_weights();
  for (const ChainRecord& chain : adapter_.chains)
    for (const LayerShape& layer : chain.layers) checked_weight(layer);
}

/// The tensors of a layer at each of its paths that the files hold: under other prefixes only where
/// they hold none of the paths as it is.
std::vector<AdaptedFiles::Names> AdaptedFiles::names_of(
    const std::vector<std::string>& paths) const {
  const bool is_there = std::any_of(paths.begin(), paths.end(), [&](const std::string& path) {
    return files_.contains(path + std::string(kWeight));
  });
  std::vector<Names> found;
  for (const std::string& path : paths) {
    const std::string wanted = path + std::string(kWeight);
    const std::string key =
        is_there ? (files_.contains(wanted) ? wanted : "") : find_name(files_, wanted);
    const bool is_new = std::none_of(found.begin(), found.end(),
                                     [&](const Names& other) { return other.weight == key; });
    if (key.empty() || !is_new) continue;
    // A file of one layer may name it "weight" alone.
    const std::string bias = key.substr(0, key.size() - (kWeight.size() - 1)) + "bias";
    found.push_back({key, files_.contains(bias) ? bias : ""});
  }
  return found;
}

void AdaptedFiles::find_weights() {
  const std::vector<std::string> transposed = transposed_chains(adapter_);
  std::map<std::string, Paths> others = other_places(adapter_);
  std::set<std::string> taken;
  for (const ChainRecord& chain : adapter_.chains) {
    const bool is_transposed =
        std::find(transposed.begin(), transposed.end(), chain.name) != transposed.end();
    for (const LayerShape& layer : chain.layers) {
      const std::vector<std::string>& names = files_.names();
      Paths paths = others[layer.name];
      paths.insert(paths.begin(), layer.name);
      std::vector<Names> found = names_of(paths);
      RESLORA_CHECK(
          !found.empty(),
          "[merge] the base must hold the weight of every adapted layer; got none for {} among {} "
          "tensors such as {}: is this the base of the adapter, or does transformers store it "
          "under other names (then merge in memory: load, merge_and_unload, save_pretrained)?",
          layer.name, names.size(),
          names.empty() ? "none" : *std::min_element(names.begin(), names.end()));
      for (const Names& own : found)
        RESLORA_CHECK(taken.insert(own.weight).second,
                      "[merge] every adapted layer must have a tensor of its own; got {} for {} "
                      "and another: is this the base of the adapter?",
                      own.weight, layer.name);
      Place& place = places_[layer.name];
      static_cast<Names&>(place) = found.front();
      place.copies.assign(found.begin() + 1, found.end());
      place.is_transposed = is_transposed;
      for (const Names& copy : place.copies) {
        RESLORA_CHECK(at::equal(files_.tensor(copy.weight), files_.tensor(place.weight)),
                      "[merge] a layer that hangs at several places must have one weight there; "
                      "got another in {} than in {}: is this the base of the adapter?",
                      copy.weight, place.weight);
        RESLORA_CHECK(copy.bias.empty() == place.bias.empty() &&
                          (copy.bias.empty() ||
                           at::equal(files_.tensor(copy.bias), files_.tensor(place.bias))),
                      "[merge] a layer that hangs at several places must have one bias there; got "
                      "another at {} than at {}: is this the base of the adapter?",
                      copy.weight, place.weight);
      }
    }
  }
}

/// The view [out, in] of a layer's weight.
Tensor AdaptedFiles::checked_weight(const LayerShape& layer) const {
  const Place& place = places_.at(layer.name);
  const Tensor stored = files_.tensor(place.weight);
  const Tensor weight = place.is_transposed && stored.dim() == 2 ? stored.t() : stored;
  RESLORA_CHECK(weight.sizes() == at::IntArrayRef({layer.out_features, layer.in_features}),
                "[merge] the base must fit the adapter; got {} for {}, where layer {} is {} -> {}",
                sizes_of(stored), place.weight, layer.name, layer.in_features, layer.out_features);
  RESLORA_CHECK(at::isFloatingType(weight.scalar_type()) && weight.element_size() > 1,
                "[merge] the base must hold F64, F32, F16 or BF16; got {} for {}: merge into the "
                "original, unquantised files",
                c10::toString(weight.scalar_type()), place.weight);
  return weight;
}

MergePlan AdaptedFiles::plan(const Statistics& statistics, const std::string& merge_method,
                             bool use_affine) const {
  const auto add_base = [&](const LayerShape& layer, LayerView& view) {
    const std::string& bias = places_.at(layer.name).bias;
    view.weight = checked_weight(layer);
    if (!bias.empty()) view.bias = files_.tensor(bias);
  };
  MergePlan plan = plan_of(adapter_, config_, statistics, merge_method, add_base, use_affine);
  files_.check_unchanged();  // the rule `weight` reads it
  return plan;
}

std::map<std::string, TensorEdit> AdaptedFiles::edits(const MergePlan& plan, bool ties_embeddings,
                                                      c10::Device device) const {
  std::map<std::string, TensorEdit> edits;
  detail::refuse_tied(detail::tied_weights(adapter_));
  for (const LayerMerge& layer : plan.layers()) {
    const auto place = places_.find(layer.name);
    RESLORA_CHECK(place != places_.end(),
                  "[merge] a plan must be of the adapter of these files; got layer {}", layer.name);
    TensorEdit edit;
    edit.layer = layer;
    edit.layer->A = layer.A.to(device);
    edit.layer->B = layer.B.to(device);
    edit.is_transposed = place->second.is_transposed;
    std::vector<Names> all = place->second.copies;
    all.push_back(place->second);
    for (const Names& names : all) {
      edits[names.weight] = edit;
      if (!layer.bias.defined()) continue;
      RESLORA_CHECK(!names.bias.empty(),
                    "[merge] the base must hold every bias that an affine fit moves; got none for "
                    "layer {}: plan without use_affine",
                    layer.name);
      TensorEdit& bias = edits[names.bias];
      bias.layer = layer;
      bias.is_bias = true;
    }
  }
  for (const auto& [name, head] : adapter_.tensors) {
    if (is_factor(name)) continue;
    RESLORA_CHECK(head.defined(), "[merge] a trained head must be a tensor; got none for {}", name);
    if (is_base_of_layer(name, head)) continue;
    const std::string found = find_name(files_, name);
    const std::string twin = twin_of(adapter_, name, head);
    // The base holds one tensor for both.
    if (found.empty() && !twin.empty() && !find_name(files_, twin).empty()) continue;
    if (twin.empty()) refuse_tied(files_, name, found, head, ties_embeddings);
    const std::string& key = found.empty() ? name : found;
    edits[key] = edit_of_head(key, head);
  }
  return edits;
}

/// True for the base weight of an adapted head, which PEFT saves too; it must be that of the files.
bool AdaptedFiles::is_base_of_layer(const std::string& name, const Tensor& tensor) const {
  const size_t at = name.rfind(kBaseLayer);
  if (at == std::string::npos) return false;
  const auto place = places_.find(name.substr(0, at));
  if (place == places_.end()) return false;
  const bool is_bias = !detail::ends_with(name, kWeight);
  const std::string& key = is_bias ? place->second.bias : place->second.weight;
  RESLORA_CHECK(!key.empty() && at::equal(files_.tensor(key).to(tensor.scalar_type()), tensor),
                "[merge] the base must hold the weights that the adapter was trained beside; got "
                "others for {} (of a resized vocabulary, in Python: reslora.load, "
                "merge_and_unload, save_pretrained)",
                place->first);
  return true;
}

/// A head under its name in the files, in their dtype.
TensorEdit AdaptedFiles::edit_of_head(const std::string& key, const Tensor& head) const {
  const bool is_there = files_.contains(key);
  const Tensor old = is_there ? files_.tensor(key) : Tensor();
  if (is_there && old.sizes() != head.sizes()) {
    RESLORA_CHECK(
        !is_embedding(key),
        "[merge] the base must be resized as for the training; got {} {} in the adapter, {} in the "
        "base (resize_token_embeddings, save_pretrained, merge into that folder)",
        key, sizes_of(head), sizes_of(old));
    TORCH_WARN("[merge] ", key, " is ", sizes_of(head), " in the adapter, ", sizes_of(old),
               " in the base: its config.json stays as it is and may not fit");
  }
  TensorEdit edit;
  edit.replacement = head;
  if (at::isFloatingType(head.scalar_type()))
    edit.replacement = head.to(is_there ? old.scalar_type() : common_dtype(files_));
  return edit;
}

}  // namespace reslora
