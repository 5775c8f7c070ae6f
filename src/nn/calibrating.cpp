// Fits for the handle of an adapted model: collecting, and measuring where taps are moved.
#include <ATen/ATen.h>
#include <reslora/adapters.h>
#include <reslora/calibration.h>

#include <utility>

#include "merge/rows.h"
#include "nn/adapter_tensors.h"
#include "nn/adapters_state.h"
#include "nn/chain_state.h"

namespace reslora {
namespace {

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

template <typename Pass>
void collect(const Pass& pass, const std::vector<LinkedChain>& chains, FitCollector& collector) {
  const Listening listening(chains, &collector);
  do {
    pass([&](const auto& batch) {
      collector.begin_batch(batch.masks());
      batch.run();
      collector.end_batch();
    });
  } while (collector.finish_pass());
}

/// What the model returns while it is merged.
template <typename Run>
at::Tensor merged_output(const Run& run, const std::vector<LinkedChain>& chains, MergePlan plan) {
  Merge merge{std::move(plan)};
  merge.enter(chains);
  at::Tensor output;
  try {
    output = run();
  } catch (...) {
    merge.leave(chains);
    throw;
  }
  merge.leave(chains);
  return output;
}

bool is_comparable(const at::Tensor& output) {
  return output.defined() && output.is_floating_point() && output.dim() > 0;
}

/// The rows of an output that are no padding, in fp32 (fp64 for fp64).
at::Tensor rows_of(const at::Tensor& output, const std::vector<at::Tensor>& masks) {
  const auto dtype = output.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return detail::as_rows(output, dtype, row_mask(masks, output.sizes().slice(0, output.dim() - 1)));
}

/// For each candidate, how far the merged model is from the adapted one on a few batches.
template <typename Pass>
std::vector<double> distances(const Pass& pass, const std::vector<LinkedChain>& chains,
                              int64_t count, const PlanOf& plan_of) {
  std::vector<double> found(count, 0.0);
  int64_t batches = 0;
  bool can_compare = true;
  pass([&](const auto& batch) {  // to the end: a DataLoader must be exhausted
    if (batches++ >= kMeasuredBatches || !can_compare) return;
    const std::vector<at::Tensor> masks = padding_masks(batch.masks(), "calibrate");
    const at::Tensor output = batch.run();
    can_compare = is_comparable(output);
    if (!can_compare) return;
    const at::Tensor wanted = rows_of(output, masks);
    for (int64_t k = 0; can_compare && k < count; ++k) {
      const at::Tensor got = merged_output(batch.run, chains, plan_of(k));
      can_compare = is_comparable(got) && got.sizes() == output.sizes();
      if (can_compare) found[k] += error_sum(wanted, rows_of(got, masks)).item<double>();
    }
  });
  return can_compare && batches > 0 ? found : std::vector<double>();
}

}  // namespace

void Adapters::calibrate_with(const Pass& pass, const FitOptions& options) const {
  state_->check_idle("calibrate");
  RESLORA_CHECK(!is_merged(),
                "[calibrate] the adapters must not be merged; got merged ones (unmerge first)");
  const std::vector<LinkedChain>& chains = state_->chains;
  std::vector<ChainView> plain = detail::views_of(chains, {});
  for (size_t i = 0; i < plain.size(); ++i)
    for (int64_t n = 0; n < plain[i].chain.size(); ++n) {
      const std::string& name = plain[i].chain.layer(n).name;
      RESLORA_CHECK(chains[i].is_enabled(), "[calibrate] adapters must be enabled; got {} disabled",
                    name);
      RESLORA_CHECK(!chains[i].is_training(n),
                    "[calibrate] the model must be in eval mode, or dropout would be fitted too; "
                    "got {} in training: call model->eval() first",
                    name);
    }
  const Busy busy(*state_, "calibrate");
  const torch::NoGradGuard no_grad;
  FitCollector collector(std::move(plain), options);
  collect(pass, chains, collector);
  MovedTaps moved = choose_moves(collector.views(), [&](int64_t count, const PlanOf& plan_of) {
    return distances(pass, chains, count, plan_of);
  });
  for (const std::string& text : {collector.padding_warning(), few_rows_warning(collector.views())})
    if (!text.empty()) TORCH_WARN(text);
  state_->fits = std::move(moved.fits);
  state_->fits_sum = detail::adapter_sum(*state_);
}

}  // namespace reslora
