// Finds the layers that a config names, and makes chains of them; see adapters.h.
#include "nn/injection.h"

#include <reslora/config_json.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <set>
#include <sstream>
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

std::vector<std::string> parts_of(const std::string& path) {
  std::vector<std::string> parts;
  std::stringstream stream(path);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

bool is_number(const std::string& part) {
  return !part.empty() && part.size() < 19 &&
         part.find_first_not_of("0123456789") == std::string::npos;
}

std::string joined(const std::vector<std::string>& parts, size_t count) {
  return fmt::format("{}", fmt::join(parts.begin(), parts.begin() + count, "."));
}

/// The kinds of linear layers that could be meant, for an error.
std::string candidates(const std::vector<Path>& modules) {
  std::vector<std::string> kinds;
  for (const auto& [path, module] : modules) {
    const std::string kind = path.substr(path.rfind('.') + 1);
    if (is_linear(*module) && std::find(kinds.begin(), kinds.end(), kind) == kinds.end())
      kinds.push_back(kind);
  }
  if (kinds.size() > 12) kinds.resize(12);
  return kinds.empty() ? "no linear layer at all" : fmt::format("{}", fmt::join(kinds, ", "));
}

/// True where `path` is, or lies inside, a module that one of `names` means.
bool is_under(const std::vector<std::string>& names, const std::string& path) {
  const std::vector<std::string> parts = parts_of(path);
  for (size_t count = 1; count <= parts.size(); ++count)
    for (const std::string& name : names)
      if (is_or_ends_with(joined(parts, count), name)) return true;
  return false;
}

/// The number of a path that counts as its layer's, -1 where there is none.
int64_t layer_index(const ResLoraConfig& config, const std::string& path) {
  const std::vector<std::string> parts = parts_of(path);
  const auto& before = config.layers_pattern();
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool counts = before.empty() || (i > 0 && std::find(before.begin(), before.end(),
                                                              parts[i - 1]) != before.end());
    if (counts && is_number(parts[i])) return std::stoll(parts[i]);
  }
  return -1;
}

void check_patterns(const std::vector<Path>& modules, const ModuleNames& targets) {
  const auto check = [&](const ModuleNames& pattern, const std::string& shown) {
    const bool is_met = std::any_of(modules.begin(), modules.end(),
                                    [&](const Path& item) { return pattern.matches(item.first); });
    RESLORA_CHECK(
        is_met,
        "[inject] target_modules must match module names; got '{}', which matches nothing "
        "(candidates: {})",
        shown, candidates(modules));
  };
  if (!targets.is_list()) return check(targets, targets.expression());
  for (const std::string& name : targets.names()) check(ModuleNames({name}), name);
}

bool is_head(const std::string& path) { return is_or_ends_with(path, "lm_head"); }

bool is_wanted(const ResLoraConfig& config, const Path& item) {
  const ModuleNames& targets = config.target_modules();
  const bool is_meant = targets.is_all_linear() ? is_linear(*item.second) && !is_head(item.first)
                                                : targets.matches(item.first);
  if (!is_meant || config.exclude_modules().matches(item.first)) return false;
  if (is_under(config.modules_to_save(), item.first)) return false;
  const auto& indices = config.layers_to_transform();
  return indices.empty() || std::find(indices.begin(), indices.end(),
                                      layer_index(config, item.first)) != indices.end();
}

void check_indices(const ResLoraConfig& config, const std::vector<Path>& found) {
  for (const int64_t index : config.layers_to_transform())
    RESLORA_CHECK(
        std::any_of(found.begin(), found.end(),
                    [&](const Path& item) { return layer_index(config, item.first) == index; }),
        "[inject] layers_to_transform must name layers that have targets; got {}", index);
}

void check_kind(const Path& item) {
  const auto& [path, module] = item;
  if (is_ours(*module)) return;
  RESLORA_CHECK(!is_linear(*module),
                "[inject] a target must be a ResLoraLinear, since LibTorch cannot replace a "
                "torch::nn::Linear from outside; got {}: declare this member as "
                "reslora::ResLoraLinear (the constructors are the same), or name it in "
                "exclude_modules",
                path);
  RESLORA_CHECK(false,
                "[inject] targets must be linear layers; got {} ({}): name it in exclude_modules",
                path, module->name());
}

template <typename T>
void check_pattern_keys(const char* option, const Patterns<T>& patterns,
                        const std::vector<Path>& found) {
  for (const auto& [pattern, value] : patterns)
    RESLORA_CHECK(
        std::any_of(found.begin(), found.end(),
                    [&, &key = pattern](const Path& p) { return matches_pattern(p.first, key); }),
        "[inject] {} must match adapted layers; got '{}', which matches none of {}, ...", option,
        pattern, found.front().first);
}

std::vector<Path> find_targets(const std::vector<Path>& modules, const ResLoraConfig& config) {
  const ModuleNames& targets = config.target_modules();
  RESLORA_CHECK(targets.is_given(),
                "[inject] target_modules must be given; got none (candidates: {}; or 'all-linear')",
                candidates(modules));
  for (const auto& [path, module] : modules) {
    const auto* layer = dynamic_cast<const ResLoraLinearImpl*>(module.get());
    RESLORA_CHECK(!layer || !layer->is_adapted(),
                  "[inject] the model must be plain; got {}, which is adapted already", path);
  }
  if (!targets.is_all_linear()) check_patterns(modules, targets);
  const ModuleNames& excluded = config.exclude_modules();
  if (excluded.is_given() && std::none_of(modules.begin(), modules.end(), [&](const Path& item) {
        return excluded.matches(item.first);
      })) {
    TORCH_WARN("[inject] exclude_modules ", excluded.shown(), " excluded nothing");
  }
  std::vector<Path> found;
  std::copy_if(modules.begin(), modules.end(), std::back_inserter(found),
               [&](const Path& item) { return is_wanted(config, item); });
  check_indices(config, found);
  RESLORA_CHECK(
      !found.empty(),
      "[inject] target_modules must match a layer; got {}, which matches none that is not "
      "excluded or in modules_to_save (candidates: {})",
      targets.shown(), candidates(modules));
  for (const Path& item : found) check_kind(item);
  check_pattern_keys("rank_pattern", config.rank_pattern(), found);
  check_pattern_keys("alpha_pattern", config.alpha_pattern(), found);
  return found;
}

template <typename T>
T value_of(const Patterns<T>& patterns, const std::string& path, T otherwise) {
  for (const auto& [pattern, value] : patterns)
    if (matches_pattern(path, pattern)) return value;
  return otherwise;
}

LayerShape shape_of(const ResLoraConfig& config, const std::string& path,
                    const ResLoraLinearImpl& layer) {
  const int64_t r = value_of(config.rank_pattern(), path, config.r());
  const double alpha = value_of(config.alpha_pattern(), path, config.lora_alpha());
  return {path, layer.options.in_features(), layer.options.out_features(), r,
          scaling_of(alpha, r, config.use_rslora())};
}

/// Parameters and buffers of modules_to_save by path.
std::map<std::string, at::Tensor> heads_of(const torch::nn::Module& model,
                                           const std::vector<Path>& modules,
                                           const std::vector<std::string>& names) {
  for (const std::string& name : names)
    RESLORA_CHECK(std::any_of(modules.begin(), modules.end(),
                              [&](const Path& p) { return is_or_ends_with(p.first, name); }),
                  "[inject] modules_to_save must match modules; got '{}'", name);
  std::map<std::string, at::Tensor> heads;
  for (const auto& [path, tensor] : base_tensors(model))
    if (is_under(names, path.substr(0, path.rfind('.')))) heads.emplace(path, tensor);
  return heads;
}

bool is_uniform(const torch::nn::Module* container) {
  if (dynamic_cast<const torch::nn::ModuleListImpl*>(container) == nullptr &&
      dynamic_cast<const torch::nn::SequentialImpl*>(container) == nullptr)
    return false;
  std::set<std::string> kinds;
  for (const auto& child : container->children()) {
    const torch::nn::Module& module = *child;
    kinds.insert(typeid(module).name());
  }
  return kinds.size() == 1;
}

void warn_without_links(const std::vector<LinkedChain>& chains, const ResLoraConfig& config) {
  if (config.res_mode() == "none" || config.pre_num() == 0) return;
  for (const LinkedChain& chain : chains)
    for (int64_t n = 0; n < chain.chain().size(); ++n)
      if (chain.chain().is_linked(n)) return;
  TORCH_WARN("[inject] no two adapted layers are linked: res_mode='", config.res_mode(),
             "' works like plain LoRA here (print_links shows the chains)");
}

/// The layers of a path's kind: the path with its layer indices replaced by `*`. An index counts
/// as one where the children of its ModuleList or Sequential are all of one class; without any,
/// the first number does.
std::string chain_key(const torch::nn::Module& model, const Modules& modules,
                      const std::string& path) {
  std::vector<std::string> parts = parts_of(path);
  std::vector<size_t> numbers;
  std::vector<size_t> starred;
  bool is_in_experts = false;
  for (size_t i = 0; i < parts.size(); ++i) {
    is_in_experts |= parts[i] == "experts";
    if (!is_number(parts[i]) || is_in_experts) continue;
    // The levels of a UNet have other resolutions.
    if (i > 0 && (parts[i - 1] == "down_blocks" || parts[i - 1] == "up_blocks")) continue;
    numbers.push_back(i);
    const auto container = modules.find(joined(parts, i));
    if (is_uniform(i == 0                       ? &model
                   : container == modules.end() ? nullptr
                                                : container->second.get()))
      starred.push_back(i);
  }
  if (starred.empty() && !numbers.empty()) starred.push_back(numbers.front());
  for (const size_t i : starred) parts[i] = "*";
  return joined(parts, parts.size());
}

}  // namespace

Prepared prepare(torch::nn::Module& model, const ResLoraConfig& config) {
  validate(config);
  config_from_json(config_to_json(config), "the options");  // `save` is not the time to find out
  RESLORA_CHECK(
      !is_ours(model),
      "[inject] the model must hold the layers; got a ResLoraLinear itself (reslora::link "
      "takes layers)");
  const std::vector<Path> modules = modules_of(model);
  const Modules by_path(modules.begin(), modules.end());
  const std::vector<Path> found = find_targets(modules, config);
  Prepared prepared{config, {}, {}, heads_of(model, modules, config.modules_to_save())};
  std::map<std::string, std::vector<Path>> members;
  for (const Path& item : found) {
    const std::string key = chain_key(model, by_path, item.first);
    if (members[key].empty()) prepared.names.push_back(key);
    members[key].push_back(item);
  }
  for (const std::string& key : prepared.names) {
    std::vector<ResLoraLinear> layers;
    std::vector<LayerShape> shapes;
    for (const auto& [path, module] : members[key]) {
      layers.emplace_back(std::dynamic_pointer_cast<ResLoraLinearImpl>(module));
      shapes.push_back(shape_of(config, path, *layers.back()));
    }
    prepared.states.push_back(new_state(layers, Chain(config, std::move(shapes))));
  }
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
  warn_without_links(state->chains, state->config);
  return state;
}

}  // namespace detail

Adapters inject(torch::nn::Module& model, const ResLoraConfig& config) {
  return Adapters(detail::commit(model, detail::prepare(model, config)));
}

}  // namespace reslora
