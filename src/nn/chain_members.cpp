// Layers become members of a chain: by hand, and again in a model that was cloned.
#include <reslora/linear.h>

#include <map>
#include <set>

#include "nn/chain_state.h"

namespace reslora {
namespace detail {

std::shared_ptr<ChainState> new_state(const std::vector<ResLoraLinear>& layers, Chain links) {
  std::vector<std::weak_ptr<ResLoraLinearImpl>> members;
  for (size_t n = 0; n < layers.size(); ++n) {
    const auto name = [&](size_t k) { return links.layer(static_cast<int64_t>(k)).name; };
    RESLORA_CHECK(!layers[n]->is_adapted(),
                  "[link] a layer is in one chain only; got {}, linked already", name(n));
    for (size_t k = 0; k < n; ++k)
      RESLORA_CHECK(layers[k].ptr() != layers[n].ptr(),
                    "[link] a layer stands once in a chain; got {} and {}, the same layer", name(k),
                    name(n));
    members.push_back(layers[n].ptr());
  }
  auto state = std::make_shared<ChainState>(std::move(links), std::move(members));
  state->allocate();
  return state;
}

LinkedChain join(const std::shared_ptr<ChainState>& state) {
  for (int64_t n = 0; n < state->chain.size(); ++n)
    ChainState::join(state, *state->layers[n].lock(), n);
  state->adapters.clear();
  return LinkedChain(state);
}

}  // namespace detail

LinkedChain link(const std::vector<ResLoraLinear>& layers, const ResLoraConfig& config,
                 std::vector<std::string> names) {
  RESLORA_CHECK(!layers.empty(), "[link] a chain needs at least one layer; got none");
  for (size_t n = 0; n < layers.size(); ++n)
    RESLORA_CHECK(!layers[n].is_empty(), "[link] a chain needs layers; got an empty holder at {}",
                  n);
  if (names.empty())
    for (size_t n = 0; n < layers.size(); ++n) names.push_back(std::to_string(n));
  RESLORA_CHECK(names.size() == layers.size(),
                "[link] needs one name per layer; got {} names for {}", names.size(),
                layers.size());
  const std::set<std::string> unique(names.begin(), names.end());
  RESLORA_CHECK(unique.size() == names.size(),
                "[link] layers must have names of their own; got [{}]", fmt::join(names, ", "));
  const double scaling = scaling_of(config.lora_alpha(), config.r(), config.use_rslora());
  std::vector<LayerShape> shapes;
  for (size_t n = 0; n < layers.size(); ++n)
    shapes.push_back({names[n], layers[n]->options.in_features(), layers[n]->options.out_features(),
                      config.r(), scaling});
  return detail::join(detail::new_state(layers, Chain(config, std::move(shapes))));
}

std::vector<LinkedChain> relink(torch::nn::Module& model) {
  std::map<std::shared_ptr<ChainState>, std::vector<std::shared_ptr<ResLoraLinearImpl>>> groups;
  std::vector<std::shared_ptr<ChainState>> order;
  // Only a layer is asked for itself: a model may lie on the stack.
  const bool is_layer = dynamic_cast<ResLoraLinearImpl*>(&model) != nullptr;
  for (const auto& module : model.modules(/*include_self=*/is_layer)) {
    auto layer = std::dynamic_pointer_cast<ResLoraLinearImpl>(module);
    if (!layer || !layer->is_adapted()) continue;
    RESLORA_CHECK(!layer->is_linked(),
                  "[relink] the model must be a clone; got {}, which is linked already",
                  layer->name());
    const auto& old = ChainState::of(*layer);
    auto& group = groups[old];
    if (group.empty()) {
      order.push_back(old);
      group.resize(old->chain.size());
    }
    group[ChainState::position_of(*layer)] = layer;
  }
  std::vector<LinkedChain> chains;
  for (const auto& old : order) {
    std::vector<std::weak_ptr<ResLoraLinearImpl>> members;
    for (size_t n = 0; n < groups[old].size(); ++n) {
      RESLORA_CHECK(groups[old][n],
                    "[relink] the model must hold every layer of a chain; got none for {}",
                    old->chain.layer(static_cast<int64_t>(n)).name);
      members.push_back(groups[old][n]);
    }
    auto state = std::make_shared<ChainState>(old->chain, std::move(members));
    state->is_enabled = old->is_enabled;
    for (const auto& layer : groups[old])
      ChainState::join(state, *layer, ChainState::position_of(*layer));
    chains.emplace_back(std::move(state));
  }
  return chains;
}

}  // namespace reslora
