// Collecting sums over calibration batches under a limit of memory; see regression.h.
//
// Layers join a pass in the order in which they run, while their sums fit; the others are deferred
// to the next pass. A layer that reads the very tensor that the layer before it read shares that
// layer's `Input`, so its rows are summed once. Where it turns out that it does not do so in all of
// its calls (a module at several places), it is put off, and the next pass sums its rows alone.
#include <reslora/calibration.h>
#include <reslora/regression.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/precision.h"
#include "core/tensor_checks.h"
#include "merge/merge_rules.h"
#include "merge/regression.h"
#include "merge/rows.h"

namespace reslora {
namespace {

using at::Tensor;

constexpr int64_t kChunkRows = 4096;
constexpr int64_t kItem = 8;  // bytes of an fp64

/// The rows of one x: their covariance, or in a file.
struct Input {
  Tensor xx;        // [in, in]; undefined where rows lie in the file
  Tensor diagonal;  // [in], where they do
  Tensor x_sum;     // [in]
  int64_t rows = 0;
  int64_t calls = 0;  // that its rows are of
  std::unique_ptr<detail::RowFile> file;
};

/// One layer on its way to its fit.
struct Slot {
  bool is_done = false;      // fitted, or merges exactly
  bool is_deferred = false;  // no room in this pass
  bool is_alone = false;     // shares its x with another layer in some of its calls only
  bool owns_input = false;   // the first layer to read its x
  std::shared_ptr<Input> input;
  Tensor vx;     // [r, in]
  Tensor ux;     // [r, in], sum A x x^T; only beside a file
  Tensor v_sum;  // [r]
  double vv = 0;
  int64_t calls = 0;
  std::optional<FitSums> kept;

  /// Leaves the layer to the next pass, with sums of its own.
  void put_off() {
    *this = Slot();
    is_alone = is_deferred = true;
  }
};

/// Sums are fp64, on the rows' device where that has fp64.
at::TensorOptions sum_options(const Tensor& x) {
  const bool has_fp64 = x.device().type() != at::kMPS;
  return at::TensorOptions().dtype(at::kDouble).device(has_fp64 ? x.device() : at::kCPU);
}

/// sum += a^T b by chunks of rows: a GEMM in the rows' precision, then one addition in fp64.
void add_product_(const Tensor& sum, const Tensor& a, const Tensor& b) {
  for (int64_t row = 0; row < a.size(0); row += kChunkRows) {
    const int64_t count = std::min(kChunkRows, a.size(0) - row);
    sum.add_(at::mm(a.narrow(0, row, count).t(), b.narrow(0, row, count)).to(sum.device()));
  }
}

void add_columns_(const Tensor& sum, const Tensor& rows) {
  sum.add_(rows.sum(at::IntArrayRef{0}, /*keepdim=*/false, at::kDouble).to(sum.device()));
}

int64_t rows_of(const Tensor& tensor) {
  return c10::multiply_integers(tensor.sizes().slice(0, tensor.dim() - 1));
}

/// Rows in fp32, of fp64 in fp64.
Tensor wide_rows(const Tensor& tensor, const std::optional<Tensor>& mask) {
  const auto dtype = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return detail::as_rows(tensor, dtype, mask);
}

}  // namespace

struct FitCollector::State {
  const LayerShape& shape(int64_t c, int64_t n) const { return views[c].chain.layer(n); }
  Slot& slot(int64_t c, int64_t n) {
    RESLORA_CHECK(c >= 0 && c < static_cast<int64_t>(views.size()),
                  "[calibrate] chain must be the index of one of the collector; got {} of {}", c,
                  views.size());
    shape(c, n);  // refuses a position that is none
    return slots[c][n];
  }
  bool has_seen(const Tensor& x) const {
    return last_x.defined() && last_x.is_same(x) && last_version == version_of(x);
  }
  static int64_t version_of(const Tensor& x) {
    return x.is_inference() ? 0 : static_cast<int64_t>(x._version());
  }
  bool join(Slot& slot, const LayerShape& layer, std::shared_ptr<Input> shared, const Tensor& x);
  void add_input(Input& input, const Tensor& rows);
  Fit fit(const Slot& slot, int64_t c, int64_t n);

  std::vector<ChainView> views;
  std::vector<std::vector<Slot>> slots;  // as the layers of `views`
  FitOptions options;
  FitCost cost;
  int64_t used = 0;  // bytes of sums in this pass
  Tensor last_x;     // held, so that its memory is not handed to another x
  int64_t last_version = 0;
  std::shared_ptr<Input> last_input;
  std::vector<Tensor> masks;       // of this batch; none where nothing is padded
  std::set<std::string> unmasked;  // layers whose padding was fitted
};

/// Takes a layer into this pass; false where its sums do not fit beside the others.
bool FitCollector::State::join(Slot& slot, const LayerShape& layer, std::shared_ptr<Input> shared,
                               const Tensor& x) {
  const int64_t own = kItem * layer.r * (layer.in_features + 1);
  const int64_t covariance = kItem * layer.in_features * (layer.in_features + 1);
  const bool is_too_large = own + covariance > options.max_cov_bytes;
  const int64_t needed = shared || is_too_large ? own : own + covariance;
  if (used > 0 && used + needed > options.max_cov_bytes) return false;
  used += needed;
  cost.peak_bytes = std::max(cost.peak_bytes, used);
  slot.owns_input = !shared;
  slot.input = shared ? std::move(shared) : std::make_shared<Input>();
  Input& input = *slot.input;
  const at::TensorOptions made = sum_options(x);
  if (slot.owns_input && is_too_large) {
    input.file = std::make_unique<detail::RowFile>(layer.in_features);
    input.diagonal = at::zeros({layer.in_features}, made);
  } else if (slot.owns_input) {
    input.xx = at::zeros({layer.in_features, layer.in_features}, made);
  }
  if (slot.owns_input) input.x_sum = at::zeros({layer.in_features}, made);
  slot.vx = at::zeros({layer.r, layer.in_features}, made);
  if (input.file) slot.ux = at::zeros_like(slot.vx);
  slot.v_sum = at::zeros({layer.r}, made);
  return true;
}

void FitCollector::State::add_input(Input& input, const Tensor& rows) {
  input.rows += rows.size(0);
  ++input.calls;
  add_columns_(input.x_sum, rows);
  if (!input.file) return add_product_(input.xx, rows, rows);
  add_columns_(input.diagonal, rows.square());
  input.file->append(rows);
  cost.row_file_bytes += rows.numel() * static_cast<int64_t>(sizeof(float));
}

Fit FitCollector::State::fit(const Slot& slot, int64_t c, int64_t n) {
  const Tensor& A = views[c].layers[n].A;
  const std::string& name = shape(c, n).name;
  Input& input = *slot.input;
  if (input.file) {
    int64_t steps = 0;
    const detail::RowSums sums{slot.vx, slot.ux, input.diagonal, slot.vv, input.rows};
    const FitAnchor anchor = fit_anchor(views[c], n);
    Fit fit = detail::solve_rows(sums, *input.file, A, options.ridge, name, anchor, steps);
    cost.solver_steps += steps;
    return fit;
  }
  FitOptions own = options;
  own.affine = options.affine && views[c].layers[n].bias.defined();
  return solve_fit({input.xx, slot.vx, input.x_sum, slot.v_sum, slot.vv, input.rows}, A, own, name,
                   fit_anchor(views[c], n));
}

FitCollector::FitCollector(std::vector<ChainView> chains, FitOptions options)
    : state_(std::make_unique<State>()) {
  RESLORA_CHECK(std::isfinite(options.ridge) && options.ridge > 0,
                "[calibrate] ridge must be a number greater than 0; got {}", options.ridge);
  RESLORA_CHECK(options.max_cov_bytes >= 0,
                "[calibrate] max_cov_bytes must not be negative; got {}", options.max_cov_bytes);
  bool has_bias = false;
  for (const ChainView& view : chains) {
    detail::check_view(view, "calibrate");
    auto& slots = state_->slots.emplace_back(view.chain.size());
    for (int64_t n = 0; n < view.chain.size(); ++n) {
      slots[n].is_done = view.chain.merges_exactly(n);
      has_bias |= view.layers[n].bias.defined();
    }
  }
  RESLORA_CHECK(!options.affine || has_bias,
                "[calibrate] affine needs layers with a bias to fold the offset into; got none");
  state_->views = std::move(chains);
  state_->options = options;
  state_->cost.passes = 1;
}

FitCollector::~FitCollector() = default;
FitCollector::FitCollector(FitCollector&&) noexcept = default;
FitCollector& FitCollector::operator=(FitCollector&&) noexcept = default;

void FitCollector::begin_batch(const std::vector<Tensor>& masks) {
  State& state = *state_;
  state.masks = padding_masks(masks, "calibrate");
  const bool is_padded = std::any_of(state.masks.begin(), state.masks.end(),
                                     [](const Tensor& mask) { return !mask.all().item<bool>(); });
  if (!is_padded) state.masks.clear();
}

void FitCollector::add(int64_t chain, int64_t position, const Tensor& x, const Tensor& v) {
  const detail::FullPrecision guard;
  State& state = *state_;
  Slot& slot = state.slot(chain, position);
  if (slot.is_done || slot.is_deferred) return;
  const LayerShape& layer = state.shape(chain, position);
  detail::check_rows(x, layer.in_features, "calibrate", "x", layer.name);
  detail::check_rows(v, layer.r, "calibrate", "v", layer.name);
  RESLORA_CHECK(rows_of(x) == rows_of(v),
                "[calibrate] x must be [..., {}] and v [..., {}] with the same rows; got {} and "
                "{} (layer {})",
                layer.in_features, layer.r, detail::described(x), detail::described(v), layer.name);
  const bool is_read_again = state.has_seen(x) && !slot.is_alone;
  if (!slot.input && !state.join(slot, layer, is_read_again ? state.last_input : nullptr, x)) {
    slot.is_deferred = true;
    return;
  }
  const bool is_in_step =
      is_read_again && slot.input == state.last_input && slot.calls + 1 == slot.input->calls;
  if (!slot.owns_input && !is_in_step) return slot.put_off();
  const std::optional<Tensor> mask = row_mask(state.masks, x.sizes().slice(0, x.dim() - 1));
  if (!state.masks.empty() && !mask) state.unmasked.insert(layer.name);
  const Tensor rows = wide_rows(x, mask);
  if (slot.owns_input) {
    state.last_x = x;
    state.last_version = State::version_of(x);
    state.last_input = slot.input;
    state.add_input(*slot.input, rows);
  }
  const Tensor targets = wide_rows(v, mask).to(rows.scalar_type());
  add_product_(slot.vx, targets, rows);
  if (slot.input->file) {
    const Tensor own = state.views[chain].layers[position].A.detach().to(rows.options());
    add_product_(slot.ux, at::mm(rows, own.t()), rows);
  }
  add_columns_(slot.v_sum, targets);
  slot.vv += detail::square_sum(targets);
  ++slot.calls;
}

void FitCollector::end_batch() {
  state_->last_x = Tensor();
  state_->last_input = nullptr;
  state_->masks.clear();
}

bool FitCollector::finish_pass() {
  State& state = *state_;
  end_batch();
  std::string unseen;
  bool has_deferred = false;
  for (size_t c = 0; c < state.slots.size(); ++c) {
    for (size_t n = 0; n < state.slots[c].size(); ++n) {
      Slot& slot = state.slots[c][n];
      const auto chain = static_cast<int64_t>(c);
      const auto position = static_cast<int64_t>(n);
      if (slot.input && slot.calls != slot.input->calls) slot.put_off();
      has_deferred |= slot.is_deferred;
      slot.is_deferred = false;
      if (slot.is_done) continue;
      if (!slot.input) {
        if (unseen.empty()) unseen = state.shape(chain, position).name;
        continue;
      }
      state.views[c].layers[n].fit = state.fit(slot, chain, position);
      if (state.options.keep_sums && !slot.input->file) {
        slot.kept = {slot.input->xx, slot.vx, slot.input->x_sum,
                     slot.v_sum,     slot.vv, slot.input->rows};
      }
      slot.is_done = true;
      slot.vx = slot.ux = slot.v_sum = Tensor();
    }
  }
  for (auto& slots : state.slots) {
    for (Slot& slot : slots) slot.input = nullptr;
  }
  state.used = 0;
  if (has_deferred) ++state.cost.passes;
  RESLORA_CHECK(has_deferred || unseen.empty(),
                "[calibrate] a layer is fitted on the rows that it saw; got none for layer {}: "
                "give batches that reach it, or merge by 'input' or 'weight'",
                unseen);
  return has_deferred;
}

const std::vector<ChainView>& FitCollector::views() const { return state_->views; }

const std::optional<FitSums>& FitCollector::sums(int64_t chain, int64_t position) const {
  return state_->slot(chain, position).kept;
}

const FitCost& FitCollector::cost() const { return state_->cost; }

std::string FitCollector::padding_warning() const {
  const std::set<std::string>& names = state_->unmasked;
  if (names.empty()) return "";
  return fmt::format(
      "[calibrate] the rows of {} layers have another shape than the attention mask, so their "
      "padding was fitted too ({}, ...)",
      names.size(), *names.begin());
}

}  // namespace reslora
