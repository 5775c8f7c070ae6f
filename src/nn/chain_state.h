// What the layers of a chain share, and how it is made: for linear.cpp and what links layers.
#pragma once

#include <reslora/linear.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "nn/passes.h"

namespace reslora {

/// What the layers of a chain share. Layers hold it; it holds them weakly. Several threads may run
/// them at once: `mutex` guards `missed` and the layers' norm windows, and passes guard themselves.
struct ChainState {
  ChainState(Chain links, std::vector<std::weak_ptr<ResLoraLinearImpl>> members)
      : chain(std::move(links)),
        layers(std::move(members)),
        missed(layers.size(), 0),
        passes(layers.size()) {}

  /// The layer at a position; throws c10::ValueError where there is none.
  std::shared_ptr<ResLoraLinearImpl> layer(int64_t position) const {
    const std::string& name = chain.layer(position).name;
    auto strong = layers[position].lock();
    RESLORA_CHECK(
        strong && strong->state_.get() == this,
        "[linear] a layer of the chain is gone; got position {} ({}): keep the model alive, "
        "and call reslora::relink on a cloned model",
        position, name);
    return strong;
  }

  /// Makes `layer` the one at `position` of `state`; adapts it first where it is plain, with what
  /// `allocate` made.
  static void join(const std::shared_ptr<ChainState>& state, ResLoraLinearImpl& layer,
                   int64_t position) {
    if (!layer.is_adapted()) layer.register_adapter(state->adapters.at(position));
    layer.state_ = state;
    layer.position_ = position;
  }

  /// Makes the A and B that `join` will register.
  void allocate() {
    for (int64_t n = 0; n < chain.size(); ++n) {
      const LayerShape& shape = chain.layer(n);
      try {
        adapters.push_back(
            layers[n].lock()->new_adapter(shape.r, chain.config().init_lora_weights()));
      } catch (const c10::Error& error) {
        RESLORA_CHECK(false, "[link] the adapter of {} could not be made with r = {}: {}",
                      shape.name, shape.r, first_line(error.what_without_backtrace()));
      }
    }
  }

  /// Marks the layers of a chain as merged, or not.
  static void mark_merged(ChainState& state, bool is_merged) {
    for (int64_t n = 0; n < state.chain.size(); ++n) state.layer(n)->is_merged_ = is_merged;
    state.is_merged = is_merged;
  }

  static const std::shared_ptr<ChainState>& of(const ResLoraLinearImpl& layer) {
    return layer.state_;
  }
  static int64_t position_of(const ResLoraLinearImpl& layer) { return layer.position_; }

  /// Returns true for the first one of the chain.
  bool count_missed(int64_t position) {
    std::lock_guard<std::mutex> lock(mutex);
    const bool is_first = std::all_of(missed.begin(), missed.end(), [](int64_t n) { return !n; });
    ++missed[position];
    return is_first;
  }

  static std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

  Chain chain;
  std::vector<std::pair<at::Tensor, at::Tensor>> adapters;  // from `allocate` until they join
  std::vector<std::weak_ptr<ResLoraLinearImpl>> layers;
  std::vector<int64_t> missed;
  bool is_enabled = true;
  bool is_merged = false;    // which is why it may not be enabled
  bool is_changing = false;  // some weights are merged, others not yet
  FitCollector* collector = nullptr;
  int64_t collector_index = 0;
  mutable std::mutex mutex;
  Passes passes;
};

namespace detail {

/// Checks that `layers` can form the chain `links`, and makes its state; changes no layer.
std::shared_ptr<ChainState> new_state(const std::vector<ResLoraLinear>& layers, Chain links);

/// Adapts and links the layers that `new_state` was given.
LinkedChain join(const std::shared_ptr<ChainState>& state);

/// The layers of one chain in a cloned model, each linked to nothing yet.
struct Copies {
  std::shared_ptr<ChainState> original;                    // of the model that was cloned
  std::vector<std::shared_ptr<ResLoraLinearImpl>> layers;  // by position
};

/// Finds the copies in a cloned model, in the order of their chains' first layers; changes nothing.
/// Throws c10::ValueError in the name of `op` for layers that are linked already, for a part of a
/// chain, and for two copies of one layer.
std::vector<Copies> copies_in(torch::nn::Module& model, const std::string& op);

/// Links the copies among themselves; cannot fail for a reason that lies in them.
LinkedChain join_copies(const Copies& copies);

}  // namespace detail
}  // namespace reslora
