// Things that a model holds under several names; see sharing.h.
#include "nn/sharing.h"

#include <reslora/adapters.h>
#include <torch/nn/modules/embedding.h>

#include <set>

#include "nn/chain_state.h"

namespace reslora::detail {
namespace {

/// The path of the module that holds a tensor, "" for the model itself.
std::string module_of(const std::string& tensor) {
  const size_t dot = tensor.rfind('.');
  return dot == std::string::npos ? "" : tensor.substr(0, dot);
}

using Paths = std::map<const torch::nn::Module*, std::vector<std::string>>;

/// Every path of every module below the model.
Paths paths_in(const torch::nn::Module& model) {
  Paths paths;
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false))
    paths[item.value().get()].push_back(item.key());
  return paths;
}

std::set<std::string> embeddings_in(const Paths& paths) {
  std::set<std::string> embeddings;
  for (const auto& [module, own] : paths)
    if (dynamic_cast<const torch::nn::EmbeddingImpl*>(module) != nullptr)
      embeddings.insert(own.begin(), own.end());
  return embeddings;
}

}  // namespace

Sharing sharing_in(const torch::nn::Module& model,
                   const std::vector<std::shared_ptr<ChainState>>& chains,
                   const std::map<std::string, at::Tensor>& heads) {
  Sharing sharing;
  const Paths paths = paths_in(model);
  std::map<std::string, std::string> layer_at;           // a layer's name by each of its paths
  std::map<const void*, std::string> layer_of, head_of;  // by the tensors
  for (const auto& state : chains) {
    for (int64_t n = 0; n < state->chain.size(); ++n) {
      const std::string& name = state->chain.layer(n).name;
      const auto layer = state->layer(n);
      layer_of.emplace(layer->weight.unsafeGetTensorImpl(), name);
      for (const std::string& path : paths.at(layer.get())) {
        layer_at.emplace(path, name);
        if (path != name) sharing.other_places[name].push_back(path);
      }
    }
  }
  for (const auto& [name, tensor] : heads) head_of.emplace(tensor.unsafeGetTensorImpl(), name);
  const std::set<std::string> embeddings = embeddings_in(paths);
  for (const auto& [name, tensor] : base_tensors(model)) {
    const std::string module = module_of(name);
    const auto layer = layer_of.find(tensor.unsafeGetTensorImpl());
    if (layer != layer_of.end()) {
      const auto place = layer_at.find(module);
      if (place == layer_at.end() || place->second != layer->second)
        sharing.tied_layers[layer->second].push_back(name);
    }
    const auto head = head_of.find(tensor.unsafeGetTensorImpl());
    if (head != head_of.end() && heads.count(name) == 0 &&
        embeddings.count(module) == embeddings.count(module_of(head->second)))
      sharing.tied_heads[head->second].push_back(name);
  }
  return sharing;
}

}  // namespace reslora::detail
