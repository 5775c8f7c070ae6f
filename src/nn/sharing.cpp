// Things that a model holds under several names; see sharing.h.
#include "nn/sharing.h"

#include <reslora/adapters.h>
#include <reslora/linear.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <set>

namespace reslora::detail {
namespace {

/// The path of the module that holds a tensor, "" for the model itself.
std::string module_of(const std::string& tensor) {
  const size_t dot = tensor.rfind('.');
  return dot == std::string::npos ? "" : tensor.substr(0, dot);
}

/// Where a tensor lies in its storage.
struct Span {
  const void* storage = nullptr;
  int64_t begin = 0, end = 0;  // bytes
};

Span span_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return {tensor.unsafeGetTensorImpl(), 0, 1};
  const auto size = static_cast<int64_t>(tensor.element_size());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t begin = size * tensor.storage_offset();
  return {tensor.storage().unsafeGetStorageImpl(), begin,
          begin + (tensor.numel() > 0 ? size * (last + 1) : 0)};
}

/// Tensors by name, to be found by the memory that they share.
class Owners {
 public:
  void add(const at::Tensor& tensor, const std::string& name) {
    const Span span = span_of(tensor);
    owners_[span.storage].emplace_back(span, name);
  }
  std::vector<std::string> of(const at::Tensor& tensor) const {
    const Span span = span_of(tensor);
    std::vector<std::string> names;
    const auto found = owners_.find(span.storage);
    if (found == owners_.end()) return names;
    for (const auto& [own, name] : found->second)
      if (span.begin < own.end && own.begin < span.end) names.push_back(name);
    return names;
  }

 private:
  std::map<const void*, std::vector<std::pair<Span, std::string>>> owners_;
};

using Tensors = std::multimap<std::string, at::Tensor>;

/// The tensors of a model by every name: what is registered, and what members hold beside it.
Tensors tensors_in(const torch::nn::Module& model, std::set<std::string>& embeddings) {
  const std::map<std::string, at::Tensor> registered = base_tensors(model);
  Tensors tensors(registered.begin(), registered.end());
  const auto add = [&](const std::string& name, const at::Tensor& member) {
    const auto known = registered.find(name);
    if (member.defined() && (known == registered.end() || !known->second.is_same(member)))
      tensors.emplace(name, member);
  };
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    const torch::nn::Module& module = *item.value();
    if (const auto* linear = dynamic_cast<const torch::nn::LinearImpl*>(&module)) {
      add(item.key() + ".weight", linear->weight);
    } else if (const auto* ours = dynamic_cast<const ResLoraLinearImpl*>(&module)) {
      add(item.key() + ".weight", ours->weight);
    } else if (const auto* own = dynamic_cast<const torch::nn::EmbeddingImpl*>(&module)) {
      embeddings.insert(item.key());
      add(item.key() + ".weight", own->weight);
    }
  }
  return tensors;
}

}  // namespace

Sharing sharing_in(const torch::nn::Module& model, const Layers& layers,
                   const std::map<std::string, at::Tensor>& heads) {
  Sharing sharing;
  Owners of_layers, of_heads;
  std::map<const torch::nn::Module*, std::string> names;
  for (const auto& [name, layer] : layers) {
    names.emplace(layer.get(), name);
    of_layers.add(layer->weight, name);
  }
  for (const auto& [name, tensor] : heads) of_heads.add(tensor, name);
  std::map<std::string, std::string> layer_at;  // a layer's name by each of its paths
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false)) {
    const auto layer = names.find(item.value().get());
    if (layer == names.end()) continue;
    layer_at.emplace(item.key(), layer->second);
    if (item.key() != layer->second) sharing.other_places[layer->second].push_back(item.key());
  }
  std::set<std::string> embeddings;
  for (const auto& [name, tensor] : tensors_in(model, embeddings)) {
    const std::string module = module_of(name);
    const auto place = layer_at.find(module);
    for (const std::string& layer : of_layers.of(tensor))
      if (place == layer_at.end() || place->second != layer)
        sharing.tied_layers[layer].push_back(name);
    for (const std::string& head : of_heads.of(tensor))
      if (heads.count(name) == 0 && embeddings.count(module) == embeddings.count(module_of(head)))
        sharing.tied_heads[head].push_back(name);
  }
  return sharing;
}

}  // namespace reslora::detail
