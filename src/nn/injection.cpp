// Describes a model to the rules for names (matching.h), and makes chains of the layers they find.
#include "nn/injection.h"

#include <reslora/adapter_folder.h>
#include <reslora/config_json.h>
#include <reslora/matching.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <set>
#include <typeinfo>
#include <unordered_set>
#include <utility>

#include "nn/adapters_state.h"
#include "nn/chain_state.h"

namespace reslora {
namespace detail {
namespace {

using Modules = std::map<std::string, std::shared_ptr<torch::nn::Module>>;
using Path = std::pair<std::string, std::shared_ptr<torch::nn::Module>>;

/// Every module below the model by path, in the order of registration; a shared one once.
std::vector<Path> modules_of(const torch::nn::Module& model) {
  std::vector<Path> found;
  std::unordered_set<const torch::nn::Module*> seen;
  for (const auto& item : model.named_modules(/*name_prefix=*/"", /*include_self=*/false))
    if (seen.insert(item.value().get()).second) found.emplace_back(item.key(), item.value());
  return found;
}

bool is_ours(const torch::nn::Module& module) {
  return dynamic_cast<const ResLoraLinearImpl*>(&module) != nullptr;
}

bool is_linear(const torch::nn::Module& module) {
  return is_ours(module) || dynamic_cast<const torch::nn::LinearImpl*>(&module) != nullptr;
}

bool is_uniform(const torch::nn::Module& container) {
  if (dynamic_cast<const torch::nn::ModuleListImpl*>(&container) == nullptr &&
      dynamic_cast<const torch::nn::SequentialImpl*>(&container) == nullptr)
    return false;
  std::set<std::string> kinds;
  for (const auto& child : container.children()) {
    const torch::nn::Module& module = *child;
    kinds.insert(typeid(module).name());
  }
  return kinds.size() == 1;
}

/// "torch::nn::EmbeddingImpl" -> "Embedding".
std::string type_of(const torch::nn::Module& module) {
  std::string name = is_linear(module) ? "Linear" : module.name();
  name = name.substr(name.rfind(':') + 1);
  const size_t end = name.size() < 4 ? name.size() : name.size() - 4;
  return name.compare(end, 4, "Impl") == 0 ? name.substr(0, end) : name;
}

/// The model and its modules as the rules for names see them.
std::vector<ModuleInfo> infos_of(const torch::nn::Module& model, const std::vector<Path>& modules) {
  std::vector<ModuleInfo> infos(1);
  infos.front().is_uniform = is_uniform(model);
  std::set<std::string> attentions;
  for (const auto& [path, module] : modules) {
    ModuleInfo info;
    info.path = path;
    info.type = type_of(*module);
    if (const auto* linear = dynamic_cast<const torch::nn::LinearImpl*>(module.get())) {
      info.in_features = linear->options.in_features();
      info.out_features = linear->options.out_features();
    } else if (const auto* ours = dynamic_cast<const ResLoraLinearImpl*>(module.get())) {
      info.in_features = ours->options.in_features();
      info.out_features = ours->options.out_features();
    }
    info.is_linear = info.in_features > 0;
    info.is_uniform = is_uniform(*module);
    info.is_bypassed = attentions.count(path.substr(0, path.rfind('.'))) > 0;
    if (dynamic_cast<const torch::nn::MultiheadAttentionImpl*>(module.get()) != nullptr)
      attentions.insert(path);
    infos.push_back(std::move(info));
  }
  return infos;
}

void check_plain(const std::vector<Path>& modules) {
  for (const auto& [path, module] : modules) {
    const auto* layer = dynamic_cast<const ResLoraLinearImpl*>(module.get());
    RESLORA_CHECK(!layer || !layer->is_adapted(),
                  "[inject] the model must be plain; got {}, which is adapted already", path);
  }
}

/// Parameters and buffers of the modules at `saved`, by path.
std::map<std::string, at::Tensor> heads_of(const torch::nn::Module& model,
                                           const std::vector<std::string>& saved) {
  std::map<std::string, at::Tensor> heads;
  for (const auto& [path, tensor] : base_tensors(model))
    for (const std::string& module : saved)
      if (path.compare(0, module.size() + 1, module + ".") == 0) heads.emplace(path, tensor);
  for (const auto& [path, tensor] : heads) check_head(path, tensor);
  return heads;
}

std::vector<std::string> names_of_heads(const AdapterFile& file) {
  std::vector<std::string> names;
  for (const auto& item : file.tensors)
    if (!is_factor(item.first)) names.push_back(item.first);
  return names;
}

std::vector<ResLoraLinear> layers_of(const ChainRecord& chain, const Modules& modules) {
  std::vector<ResLoraLinear> layers;
  for (const LayerShape& shape : chain.layers) {
    auto layer = std::dynamic_pointer_cast<ResLoraLinearImpl>(modules.at(shape.name));
    RESLORA_CHECK(layer != nullptr,
                  "[inject] a target must be a ResLoraLinear, since LibTorch cannot replace a "
                  "torch::nn::Linear from outside; got {}: declare this member as "
                  "reslora::ResLoraLinear (the constructors are the same), or name it in "
                  "exclude_modules",
                  shape.name);
    layers.emplace_back(std::move(layer));
  }
  return layers;
}

}  // namespace

Prepared prepare(torch::nn::Module& model, const ResLoraConfig& config, const AdapterFile* file) {
  validate(config);
  config_from_json(config_to_json(config), "the options");  // `save` is not the time to find out
  RESLORA_CHECK(
      !is_ours(model),
      "[inject] the model must hold the layers; got a ResLoraLinear itself (reslora::link "
      "takes layers)");
  const std::vector<Path> modules = modules_of(model);
  const Modules by_path(modules.begin(), modules.end());
  check_plain(modules);
  const std::vector<ModuleInfo> infos = infos_of(model, modules);
  Matching found = file == nullptr
                       ? match_layers(infos, config)
                       : match_saved(infos, config, file->chains, names_of_heads(*file));
  for (const std::string& warning : found.warnings) TORCH_WARN(warning);
  Prepared prepared{config, {}, {}, heads_of(model, found.saved)};
  prepared.config.target_modules(std::move(found.targets));
  std::vector<ChainRecord> chains = find_chains(infos, found.layers, config);
  if (file != nullptr) check_chains(chains, file->chains);  // before memory is taken for options
  for (ChainRecord& chain : chains) {
    const std::vector<ResLoraLinear> layers = layers_of(chain, by_path);
    prepared.names.push_back(std::move(chain.name));
    prepared.states.push_back(new_state(layers, Chain(config, std::move(chain.layers))));
  }
  std::vector<const Chain*> links;
  for (const auto& state : prepared.states) links.push_back(&state->chain);
  const std::string warning = warning_without_links(links);
  if (!warning.empty()) TORCH_WARN(warning);  // here, since a handler of warnings may throw
  return prepared;
}

std::shared_ptr<Adapters::State> commit(torch::nn::Module& model, Prepared prepared) {
  auto state = std::make_shared<Adapters::State>();
  for (at::Tensor& parameter : model.parameters()) parameter.set_requires_grad(false);
  for (const auto& own : prepared.states) state->chains.push_back(join(own));
  for (auto& item : model.named_parameters())
    if (prepared.heads.count(item.key()) > 0 && item.value().is_floating_point())
      item.value().set_requires_grad(true);
  state->config = std::move(prepared.config);
  state->names = std::move(prepared.names);
  state->heads = std::move(prepared.heads);
  Layers layers;
  for (const auto& own : prepared.states)
    for (int64_t n = 0; n < own->chain.size(); ++n)
      layers.emplace_back(own->chain.layer(n).name, own->layer(n));
  state->sharing = sharing_in(model, layers, state->heads);
  return state;
}

}  // namespace detail

Adapters inject(torch::nn::Module& model, const ResLoraConfig& config) {
  return Adapters(detail::commit(model, detail::prepare(model, config)));
}

}  // namespace reslora
