// Moving taps to the layers whose inputs they read; see regression.h.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/regression.h>

#include <algorithm>

#include "core/check.h"
#include "merge/merge_rules.h"

namespace reslora {
namespace {

using at::Tensor;

/// What a layer stands for without its shortcut: its fit, or itself where it merges exactly.
Fit start_of(const ChainView& view, int64_t n) {
  const LayerView& layer = view.layers[n];
  Fit fit = layer.fit;
  if (fit.A.defined()) {
    if (!fit.B.defined()) fit.B = layer.B;
    return fit;
  }
  RESLORA_CHECK(
      view.chain.merges_exactly(n),
      "[move_taps] every linked layer needs a fit; got none for layer {}: calibrate first",
      view.chain.layer(n).name);
  fit.A = layer.A;
  fit.B = view.chain.wiring(n).is_doubled ? layer.B * 2 : layer.B;
  return fit;
}

/// True where the sources of layer n's taps have outputs that its own can be added to.
bool is_movable(const Chain& chain, int64_t n) {
  const std::vector<int64_t> sources = chain.reached(n);
  return !sources.empty() && std::all_of(sources.begin(), sources.end(), [&](int64_t j) {
    return chain.layer(j).out_features == chain.layer(n).out_features;
  });
}

/// a + share (b - a), where a is defined.
Tensor mixed(const Tensor& a, const Tensor& b, double share) {
  return a.defined() ? a + (b.to(a.options()) - a) * share : a;
}

/// Adds rows to A, with what multiplies them.
void append_(Fit& fit, const Tensor& A, const Tensor& B) {
  const Tensor rows = A.to(fit.A.options());
  fit.A = at::cat({fit.A, rows}, 0);
  fit.B = at::cat({fit.B, B.to(fit.B.options())}, 1);
  if (!fit.offset.defined()) return;
  fit.affine_A = at::cat({fit.affine_A, rows.to(fit.affine_A.options())}, 0);
  fit.offset = at::cat({fit.offset, at::zeros({rows.size(0)}, fit.offset.options())}, 0);
}

}  // namespace

std::vector<Fit> move_taps(const ChainView& view, double share) {
  const Chain& chain = view.chain;
  RESLORA_CHECK(share >= 0 && share <= 1, "[move_taps] share must be within 0 and 1; got {}",
                share);
  detail::check_view(view, "move_taps");
  for (int64_t n = 0; n < chain.size(); ++n) detail::check_fit(view, n, "move_taps");
  std::vector<Fit> fits;
  for (int64_t n = 0; n < chain.size(); ++n) {
    fits.push_back(start_of(view, n));
    if (!is_movable(chain, n)) continue;
    // What is fitted is linear in the taps: A x + (1 - share) taps.
    Fit& fit = fits.back();
    fit.A = mixed(fit.A, view.layers[n].A, share);
    fit.affine_A = mixed(fit.affine_A, view.layers[n].A, share);
    if (fit.offset.defined()) fit.offset = fit.offset * (1 - share);
  }
  for (int64_t source = 0; source < chain.size(); ++source) {
    std::vector<int64_t> readers;
    for (int64_t n = source + 1; n < chain.size(); ++n) {
      const std::vector<int64_t> sources = chain.reached(n);
      if (is_movable(chain, n) && std::count(sources.begin(), sources.end(), source) > 0)
        readers.push_back(n);
    }
    const auto moved_B = [&](int64_t n) {
      return view.layers[n].B * (share * chain.layer(n).scaling / chain.layer(source).scaling);
    };
    if (readers.empty()) continue;
    if (chain.shortcut() == Shortcut::kIs) {  // a tap is the reader's A times the source's input
      for (const int64_t n : readers) append_(fits[source], view.layers[n].A, moved_B(n));
    } else {  // the source's own product: one block of rows for all readers
      Tensor B = moved_B(readers[0]);
      for (size_t i = 1; i < readers.size(); ++i) B = B + moved_B(readers[i]).to(B.options());
      append_(fits[source], view.layers[source].A, B);
    }
  }
  return fits;
}

}  // namespace reslora
