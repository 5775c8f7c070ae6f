// Layers become members of a chain: by hand, and again in a model that was cloned.
#include <reslora/linear.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

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

std::vector<Copies> copies_in(torch::nn::Module& model, const std::string& op) {
  std::vector<Copies> found;
  // Only a layer is asked for itself: a model may lie on the stack.
  const bool is_layer = dynamic_cast<ResLoraLinearImpl*>(&model) != nullptr;
  for (const auto& module : model.modules(/*include_self=*/is_layer)) {
    auto layer = std::dynamic_pointer_cast<ResLoraLinearImpl>(module);
    if (!layer || !layer->is_adapted()) continue;
    RESLORA_CHECK(!layer->is_linked(),
                  "[{}] the model must be a clone; got {}, which is linked already", op,
                  layer->name());
    const auto& original = ChainState::of(*layer);
    auto copies = std::find_if(found.begin(), found.end(),
                               [&](const Copies& one) { return one.original == original; });
    if (copies == found.end())
      copies = found.insert(
          copies,
          {original, std::vector<std::shared_ptr<ResLoraLinearImpl>>(original->chain.size())});
    auto& own = copies->layers[ChainState::position_of(*layer)];
    RESLORA_CHECK(!own || own == layer,
                  "[{}] a clone must hold every layer once; got two copies of {}, since LibTorch "
                  "clones what stands twice in a model twice: make the model anew, and load the "
                  "adapter into it",
                  op, layer->name());
    own = std::move(layer);
  }
  for (const Copies& copies : found)
    for (size_t n = 0; n < copies.layers.size(); ++n)
      RESLORA_CHECK(copies.layers[n],
                    "[{}] the model must hold every layer of a chain; got none for {}", op,
                    copies.original->chain.layer(static_cast<int64_t>(n)).name);
  return found;
}

LinkedChain join_copies(const Copies& copies) {
  const auto state = std::make_shared<ChainState>(
      copies.original->chain,
      std::vector<std::weak_ptr<ResLoraLinearImpl>>(copies.layers.begin(), copies.layers.end()));
  // What is merged runs without its adapters. The original may have been merged, or unmerged,
  // since.
  state->is_merged = copies.layers[0]->is_merged();
  state->is_enabled =
      !state->is_merged && (copies.original->is_enabled || copies.original->is_merged);
  for (size_t n = 0; n < copies.layers.size(); ++n)
    ChainState::join(state, *copies.layers[n], static_cast<int64_t>(n));
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
  std::vector<LinkedChain> chains;
  for (const detail::Copies& copies : detail::copies_in(model, "relink"))
    chains.push_back(detail::join_copies(copies));
  return chains;
}

}  // namespace reslora
