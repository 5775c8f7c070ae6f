// Fits for the handle of an adapted model: collecting, and which chains have their taps moved.
#include <ATen/ATen.h>
#include <reslora/adapters.h>

#include <utility>

#include "merge/merge_rules.h"
#include "nn/adapter_tensors.h"
#include "nn/adapters_state.h"
#include "nn/chain_state.h"

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

double squared(const at::Tensor& t) { return t.to(at::kDouble).square().sum().item<double>(); }

template <typename Pass>
Fits collected(const Pass& pass, const std::vector<LinkedChain>& chains,
               std::vector<ChainView> plain, const FitOptions& options) {
  FitCollector collector(std::move(plain), options);
  const Listening listening(chains, &collector);
  do {
    pass([&](const auto& run) {
      run();
      collector.end_batch();
    });
  } while (collector.finish_pass());
  Fits fits;
  for (const ChainView& view : collector.views()) {
    auto& own = fits.emplace_back();
    for (const LayerView& layer : view.layers) own.push_back(layer.fit);
  }
  return fits;
}

/// For each candidate, how far the merged model is from the adapted one on a few batches. Every
/// batch is run for all of them before the next: a loader may shuffle. Empty where outputs cannot
/// be compared.
template <typename Pass>
std::vector<double> distances(const Pass& pass, const std::vector<LinkedChain>& chains,
                              const std::vector<Fits>& candidates) {
  std::vector<Merge> merges;
  merges.reserve(candidates.size());
  for (const Fits& fits : candidates)
    merges.push_back(Merge{MergePlan(detail::views_of(chains, fits), "lsq")});
  std::vector<double> found(candidates.size(), 0.0);
  size_t batches = 0;
  bool is_comparable = true;
  pass([&](const auto& run) {
    if (batches++ >= kMeasured || !is_comparable) return;
    const at::Tensor wanted = run();
    is_comparable = wanted.defined() && wanted.is_floating_point();
    for (size_t k = 0; is_comparable && k < merges.size(); ++k) {
      merges[k].enter(chains);
      try {
        found[k] += squared(run() - wanted);
      } catch (...) {
        merges[k].leave(chains);
        throw;
      }
      merges[k].leave(chains);
    }
  });
  return is_comparable && batches > 0 ? found : std::vector<double>();
}

/// `plain` with the taps of those chains moved whose moved form is nearer to the model.
template <typename Pass>
Fits with_moves(const Pass& pass, const std::vector<LinkedChain>& chains, const Fits& plain) {
  std::vector<Fits> candidates = {plain};
  std::vector<size_t> moved;  // the chain of each further candidate
  const std::vector<ChainView> views = detail::views_of(chains, plain);
  for (size_t i = 0; i < views.size(); ++i) {
    if (detail::merges_exactly(views[i].chain)) continue;
    candidates.push_back(plain);
    candidates.back()[i] = move_taps(views[i], kShare);
    moved.push_back(i);
  }
  if (moved.empty()) return plain;
  const std::vector<double> apart = distances(pass, chains, candidates);
  Fits together = plain;
  for (size_t k = 0; k + 1 < apart.size(); ++k)
    if (apart[k + 1] < apart[0]) together[moved[k]] = candidates[k + 1][moved[k]];
  const std::vector<double> last = distances(pass, chains, {plain, together});
  return !last.empty() && last[1] < last[0] ? together : plain;
}

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
  const Fits fits = collected(pass, state_->chains, std::move(plain), options);
  state_->fits = with_moves(pass, state_->chains, fits);
  state_->fits_sum = detail::adapter_sum(*state_);
}

}  // namespace reslora
