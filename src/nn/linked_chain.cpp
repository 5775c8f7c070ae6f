// What programs do with the chain of layers that they have linked; see linear.h.
#include <reslora/linear.h>

#include <mutex>
#include <vector>

#include "nn/chain_state.h"

namespace reslora {

const Chain& LinkedChain::chain() const { return state_->chain; }

void LinkedChain::begin_forward() const { state_->passes.begin(); }

std::vector<at::Tensor> LinkedChain::parameters() const {
  std::vector<at::Tensor> all;
  for (int64_t n = 0; n < state_->chain.size(); ++n) {
    all.push_back(state_->layer(n)->reslora_A);
    all.push_back(state_->layer(n)->reslora_B);
  }
  return all;
}

ChainView LinkedChain::view() const {
  ChainView view{state_->chain, {}};
  for (int64_t n = 0; n < state_->chain.size(); ++n) {
    const auto layer = state_->layer(n);
    view.layers.push_back(
        {layer->weight, layer->reslora_A, layer->reslora_B, layer->norms_now(), layer->bias, {}});
  }
  return view;
}

void LinkedChain::set_enabled(bool is_enabled) const { state_->is_enabled = is_enabled; }

bool LinkedChain::is_enabled() const { return state_->is_enabled; }

void LinkedChain::mark_merged(bool is_merged) const { ChainState::mark_merged(*state_, is_merged); }

void LinkedChain::collect(FitCollector* collector, int64_t index) const {
  state_->collector = collector;
  state_->collector_index = index;
}

void LinkedChain::set_norms(int64_t position, const NormWindow& norms) const {
  state_->layer(position)->set_norms(norms);
}

void LinkedChain::leave_out(int64_t position, const std::vector<int64_t>& others) const {
  state_->chain.leave_out(position, others);
}

bool LinkedChain::is_training(int64_t position) const {
  return state_->layer(position)->is_training();
}

int64_t LinkedChain::missed_links(int64_t position) const {
  state_->chain.layer(position);  // refuses a position that is none
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->missed[position];
}

}  // namespace reslora
