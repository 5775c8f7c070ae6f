// Fits for the handle of an adapted model: collecting, and which chains have their taps moved.
#include <ATen/ATen.h>
#include <reslora/adapters.h>

#include <cmath>
#include <utility>

#include "internal/adapter_tensors.h"
#include "internal/chain_state.h"
#include "internal/injection.h"

namespace reslora {
namespace {

constexpr double kShare = 0.5;   // of what a tap brings; see move_taps
constexpr size_t kMeasured = 2;  // batches that a move is tried on

/// Hands what the layers read to a collector while it lives.
class Listening {
 public:
  Listening(const std::vector<LinkedChain>& chains, FitCollector* collector) : chains_(chains) {
    for (size_t i = 0; i < chains_.size(); ++i)
      chains_[i].collect(collector, static_cast<int64_t>(i));
  }
  ~Listening() {
    for (const LinkedChain& chain : chains_) chain.collect(nullptr);
  }
  Listening(const Listening&) = delete;
  Listening& operator=(const Listening&) = delete;

 private:
  const std::vector<LinkedChain>& chains_;
};

bool merges_exactly(const Chain& chain) {
  for (int64_t n = 0; n < chain.size(); ++n)
    if (!chain.merges_exactly(n)) return false;
  return true;
}

double squared(const at::Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

}  // namespace

void Adapters::calibrate_with(const Pass& pass, const FitOptions& options) const {
  RESLORA_CHECK(!is_merged(),
                "[calibrate] the adapters must not be merged; got merged ones (unmerge first)");
  std::vector<ChainView> plain = views();
  for (size_t i = 0; i < plain.size(); ++i)
    for (int64_t n = 0; n < plain[i].chain.size(); ++n) {
      plain[i].layers[n].fit = {};
      RESLORA_CHECK(!state_->chains[i].is_training(n),
                    "[calibrate] the model must be in eval mode, or dropout would be fitted too; "
                    "got {} in training: call model->eval() first",
                    plain[i].chain.layer(n).name);
    }
  const torch::NoGradGuard no_grad;
  FitCollector collector(std::move(plain), options);
  {
    const Listening listening(state_->chains, &collector);
    do {
      pass([&](const Run& run) {
        run();
        collector.end_batch();
      });
    } while (collector.finish_pass());
  }
  state_->fits.clear();
  for (const ChainView& view : collector.views()) {
    auto& fits = state_->fits.emplace_back();
    for (const LayerView& layer : view.layers) fits.push_back(layer.fit);
  }
  state_->fits_sum = detail::adapter_sum(*state_);
  choose_moves(pass);
}

/// Moves the taps of those chains whose moved form is nearer to the model on a few batches.
void Adapters::choose_moves(const Pass& pass) const {
  const auto first_outputs = [&] {
    std::vector<at::Tensor> outputs;
    pass([&](const Run& run) {
      if (outputs.size() < kMeasured) outputs.push_back(run());
    });
    return outputs;
  };
  std::vector<size_t> movable;
  for (size_t i = 0; i < state_->chains.size(); ++i)
    if (!merges_exactly(state_->chains[i].chain())) movable.push_back(i);
  if (movable.empty()) return;
  const std::vector<at::Tensor> wanted = first_outputs();
  for (const at::Tensor& output : wanted)
    if (!output.defined() || !output.is_floating_point()) return;
  const auto distance = [&] {
    merge("lsq");
    double total = 0;
    try {
      const std::vector<at::Tensor> outputs = first_outputs();
      for (size_t k = 0; k < wanted.size(); ++k) total += squared(outputs[k] - wanted[k]);
    } catch (...) {
      unmerge();
      throw;
    }
    unmerge();
    return total;
  };
  const auto plain = state_->fits;
  auto together = plain;
  const double start = distance();
  bool is_moved = false;
  for (const size_t i : movable) {
    state_->fits = plain;
    const std::vector<Fit> moved = move_taps(views()[i], kShare);
    state_->fits[i] = moved;
    if (distance() >= start) continue;
    together[i] = moved;
    is_moved = true;
  }
  state_->fits = together;
  if (is_moved && distance() >= start) state_->fits = plain;
}

}  // namespace reslora
