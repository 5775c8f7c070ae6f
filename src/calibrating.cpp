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
  const auto earlier_fits = state_->fits;
  const std::string earlier_sum = state_->fits_sum;
  try {
    FitCollector collector(std::move(plain), options);
    collect_fits(pass, collector);
    state_->fits.clear();
    for (const ChainView& view : collector.views()) {
      auto& fits = state_->fits.emplace_back();
      for (const LayerView& layer : view.layers) fits.push_back(layer.fit);
    }
    state_->fits_sum = detail::adapter_sum(*state_);
    choose_moves(pass);
  } catch (...) {
    state_->fits = earlier_fits;
    state_->fits_sum = earlier_sum;
    throw;
  }
}

void Adapters::collect_fits(const Pass& pass, FitCollector& collector) const {
  const Listening listening(state_->chains, &collector);
  do {
    pass([&](const Run& run) {
      run();
      collector.end_batch();
    });
  } while (collector.finish_pass());
}

/// For each of `candidates`, how far the merged model is from the adapted one on a few batches.
/// Every batch is run for all of them before the next: a loader may shuffle. Empty where outputs
/// cannot be compared.
std::vector<double> Adapters::distances(
    const Pass& pass, const std::vector<std::vector<std::vector<Fit>>>& candidates) const {
  std::vector<double> found(candidates.size(), 0.0);
  size_t batches = 0;
  bool is_comparable = true;
  pass([&](const Run& run) {
    if (batches++ >= kMeasured || !is_comparable) return;
    const at::Tensor wanted = run();
    is_comparable = wanted.defined() && wanted.is_floating_point();
    for (size_t k = 0; is_comparable && k < candidates.size(); ++k) {
      state_->fits = candidates[k];
      merge("lsq");
      try {
        found[k] += squared(run() - wanted);
      } catch (...) {
        unmerge();
        throw;
      }
      unmerge();
    }
  });
  return is_comparable && batches > 0 ? found : std::vector<double>();
}

/// Moves the taps of those chains whose moved form is nearer to the model on a few batches.
void Adapters::choose_moves(const Pass& pass) const {
  const auto plain = state_->fits;
  std::vector<std::vector<std::vector<Fit>>> candidates = {plain};
  std::vector<size_t> moved;  // the chain of each further candidate
  const std::vector<ChainView> all = views();
  for (size_t i = 0; i < all.size(); ++i) {
    if (merges_exactly(all[i].chain)) continue;
    candidates.push_back(plain);
    candidates.back()[i] = move_taps(all[i], kShare);
    moved.push_back(i);
  }
  if (moved.empty()) return;
  const std::vector<double> apart = distances(pass, candidates);
  auto together = plain;
  for (size_t k = 0; k + 1 < apart.size(); ++k)
    if (apart[k + 1] < apart[0]) together[moved[k]] = candidates[k + 1][moved[k]];
  const std::vector<double> last = distances(pass, {plain, together});
  state_->fits = !last.empty() && last[1] < last[0] ? together : plain;
}

}  // namespace reslora
