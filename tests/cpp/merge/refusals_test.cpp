// What the public calls of plans, fits, calibration and errors refuse.
#include "refusals.h"

#include <reslora/calibration.h>
#include <reslora/finishing.h>
#include <reslora/merge.h>
#include <reslora/merge_errors.h>
#include <reslora/regression.h>

#include <cmath>

namespace reslora {
namespace {

using testing::refuse_nothing;
using testing::refuses_call;
using testing::refuses_positions;
using testing::refuses_tensors;
using testing::Wrong;

constexpr int64_t kIn = 4, kOut = 4, kR = 2;
const std::set<Wrong> kMayMiss = {Wrong::kUndefined};

Fit fit_of_layer() {
  Fit fit;
  fit.A = at::randn({kR, kIn});
  fit.B = at::randn({kOut, kR});
  fit.affine_A = at::randn({kR, kIn});
  fit.offset = at::randn({kR});
  fit.rows = 10;
  return fit;
}

/// A chain of three `is` layers with all that may be known of them.
ChainView good_view() {
  std::vector<LayerShape> shapes;
  for (const char* name : {"a", "b", "c"}) shapes.push_back({name, kIn, kOut, kR, 1});
  ChainView view{Chain(ResLoraConfig().res_mode("is"), shapes), {}};
  for (int n = 0; n < 3; ++n)
    view.layers.push_back({at::randn({kOut, kIn}), at::randn({kR, kIn}), at::randn({kOut, kR}),
                           NormWindow(at::rand({2, 3}), at::full({1}, 2, at::kLong)),
                           at::randn({kOut}), fit_of_layer()});
  return view;
}

ChainView short_view() {
  ChainView view = good_view();
  view.layers.pop_back();
  return view;
}

using Call = std::function<void(const ChainView&)>;

/// Rows for what is given a view: `set` puts a tensor at its place in the second layer.
void of_view(const char* function, const char* argument, const at::Tensor& good,
             const std::function<void(LayerView&, const at::Tensor&)>& set, const Call& call,
             const std::set<Wrong>& accepted = {}) {
  refuses_tensors(
      function, argument, good,
      [&](const at::Tensor& tensor) {
        ChainView view = good_view();
        set(view.layers[1], tensor);
        call(view);
      },
      accepted);
}

void of_factors(const char* function, const Call& call) {
  of_view(
      function, "A", at::randn({kR, kIn}), [](auto& layer, auto& A) { layer.A = A; }, call);
  of_view(
      function, "B", at::randn({kOut, kR}), [](auto& layer, auto& B) { layer.B = B; }, call);
  refuses_call(
      function, "a view that is too short", [&] { call(short_view()); }, "got 2 for 3");
}

void of_fits(const char* function, const Call& call, const std::set<Wrong>& missing_fit = {}) {
  const Fit good = fit_of_layer();
  // With a B of its own a fit may have any rank, and both must then agree.
  of_view(
      function, "fit.A", good.A, [](auto& layer, auto& A) { layer.fit.A = A; }, call, missing_fit);
  of_view(
      function, "fit.B", good.B, [](auto& layer, auto& B) { layer.fit.B = B; }, call, kMayMiss);
  of_view(
      function, "fit.affine_A", good.affine_A, [](auto& layer, auto& A) { layer.fit.affine_A = A; },
      call);
  of_view(
      function, "fit.offset", good.offset,
      [](auto& layer, auto& offset) { layer.fit.offset = offset; }, call, kMayMiss);
}

TEST(MergeRefusals, Plans) {
  for (const char* method : {"lsq", "input", "weight"})
    of_factors("MergePlan::MergePlan", [&](const ChainView& view) { MergePlan({view}, method); });
  of_fits("MergePlan::MergePlan", [](const ChainView& view) { MergePlan({view}, "lsq"); });
  of_view(
      "MergePlan::MergePlan", "bias", at::randn({kOut}),
      [](auto& layer, auto& bias) { layer.bias = bias; },
      [](const ChainView& view) { MergePlan({view}, "lsq"); }, kMayMiss);
  of_view(
      "MergePlan::MergePlan", "weight", at::randn({kOut, kIn}),
      [](auto& layer, auto& weight) { layer.weight = weight; },
      [](const ChainView& view) { MergePlan({view}, "weight"); });
  refuses_call(
      "MergePlan::MergePlan", "method", [] { MergePlan({good_view()}, "best"); }, "'best'");
  for (const char* method : {"lsq", "input"})
    of_view(
        "MergePlan::apply", "weight", at::randn({kOut, kIn}),
        [](auto& layer, auto& weight) { layer.weight = weight; },
        [&](const ChainView& view) { MergePlan({view}, method).apply(); });
  refuse_nothing({"MergePlan::layers", "MergePlan::is_applied", "MergePlan::done",
                  "MergePlan::fell_back_to_weight"});
}

TEST(MergeRefusals, Reverting) {
  const ChainView view = good_view();
  MergePlan plan({view}, "lsq");
  refuses_call(
      "MergePlan::revert", "not applied", [&] { plan.revert(); }, "call apply first");
  const std::vector<at::Tensor> weights = {view.layers[0].weight, view.layers[1].weight,
                                           view.layers[2].weight};
  const std::vector<at::Tensor> biases = {view.layers[0].bias, view.layers[1].bias,
                                          view.layers[2].bias};
  plan.apply();
  refuses_call(
      "MergePlan::apply", "twice", [&] { plan.apply(); }, "call revert first");
  refuses_call(
      "MergePlan::revert", "one weight", [&] { plan.revert({weights[0]}); }, "got 1 and 3");
  const auto reverted = [&](bool is_bias) {
    return [&, is_bias](const at::Tensor& tensor) {
      std::vector<at::Tensor> W = weights, b = biases;
      (is_bias ? b : W)[1] = tensor;
      if (!plan.is_applied()) plan.apply();
      plan.revert(W, b);
    };
  };
  const auto going_on = [&](bool is_bias) {
    return [&, is_bias](const at::Tensor& tensor) {
      std::vector<at::Tensor> W = weights, b = biases;
      (is_bias ? b : W)[1] = tensor;
      plan.go_on_with(W, b);
    };
  };
  refuses_call(
      "MergePlan::go_on_with", "one weight", [&] { plan.go_on_with({weights[0]}, biases); },
      "got 1 and 3");
  refuses_tensors("MergePlan::go_on_with", "weights", weights[1], going_on(false));
  refuses_tensors("MergePlan::go_on_with", "biases", biases[1], going_on(true));
  refuses_tensors("MergePlan::revert", "weights", weights[1], reverted(false));
  refuses_tensors("MergePlan::revert", "biases", biases[1], reverted(true));
}

LayerMerge good_pair() {
  LayerMerge layer;
  layer.name = "q";
  layer.A = at::randn({kR, kIn});
  layer.B = at::randn({5, kR});
  layer.bias = at::randn({5});
  return layer;
}

/// Rows for what is given a pair; with no other tensor that A must fit, a wider one is another's.
void of_pair(const char* function, const std::function<void(const LayerMerge&)>& call,
             const std::set<Wrong>& accepted = {}) {
  const LayerMerge good = good_pair();
  const auto with = [&](at::Tensor LayerMerge::*member) {
    return [&call, good, member](const at::Tensor& tensor) {
      LayerMerge layer = good;
      layer.*member = tensor;
      call(layer);
    };
  };
  refuses_tensors(function, "A", good.A, with(&LayerMerge::A), accepted);
  refuses_tensors(function, "B", good.B, with(&LayerMerge::B));
  refuses_tensors(function, "bias", good.bias, with(&LayerMerge::bias), kMayMiss);
}

TEST(MergeRefusals, Pairs) {
  const LayerMerge good = good_pair();
  const at::Tensor W = at::randn({5, kIn}), bias = at::randn({5}), x = at::randn({3, kIn});
  of_pair("singular_values", [](auto& layer) { singular_values(layer); }, {Wrong::kColumns});
  of_pair("merged_weight", [&](auto& layer) { merged_weight(W, layer); });
  of_pair("merged_forward", [&](auto& layer) { merged_forward(layer, x, W, bias); });
  refuses_tensors("merged_weight", "weight", W, [&](auto& W) { merged_weight(W, good); });
  refuses_tensors("merged_forward", "weight", W,
                  [&](auto& W) { merged_forward(good, x, W, bias); });
  refuses_tensors("merged_forward", "x", x, [&](auto& x) { merged_forward(good, x, W, bias); },
                  {Wrong::kDims});
  refuses_tensors("merged_forward", "bias", bias,
                  [&](auto& bias) { merged_forward(good, x, W, bias); });
}

TEST(MergeRefusals, ErrorsOfLayers) {
  const LayerMerge good = good_pair();
  const at::Tensor W = at::randn({5, kIn}), x = at::randn({3, kIn}), s = at::randn({3, kR});
  const at::Tensor y = at::randn({3, 5}), B = at::randn({5, kR}), mask = at::ones({3}, at::kBool);
  of_pair("layer_errors", [&](auto& layer) { layer_errors(layer, x, s, y, {B}, {1}, W); });
  refuses_tensors("layer_errors", "x", x,
                  [&](auto& x) { layer_errors(good, x, s, y, {B}, {1}, W); });
  refuses_tensors("layer_errors", "s", s,
                  [&](auto& s) { layer_errors(good, x, s, y, {B}, {1}, W); });
  refuses_tensors("layer_errors", "y", y,
                  [&](auto& y) { layer_errors(good, x, s, y, {B}, {1}, W); });
  refuses_tensors("layer_errors", "B", B,
                  [&](auto& B) { layer_errors(good, x, s, y, {B}, {1}, W); });
  refuses_tensors(
      "layer_errors", "weight", W, [&](auto& W) { layer_errors(good, x, s, y, {B}, {1}, W); },
      kMayMiss);
  refuses_tensors("layer_errors", "mask", mask,
                  [&](auto& mask) { layer_errors(good, x, s, y, {B}, {1}, W, mask); },
                  {Wrong::kDims, Wrong::kDtype});
  refuses_call(
      "layer_errors", "scaling", [&] { layer_errors(good, x, s, y, {B}, {}, W); }, "got 1 and 0");
}

TEST(MergeRefusals, Finishing) {
  const auto plain = [](const ChainView& view) {  // a finish keeps the rank
    ChainView own = view;
    for (LayerView& layer : own.layers) layer.fit.offset = at::Tensor();
    finish_chain(own);
  };
  of_factors("finish_chain", plain);
  of_view(
      "finish_chain", "fit.A", at::randn({kR, kIn}), [](auto& l, auto& A) { l.fit.A = A; }, plain);
  of_view(
      "finish_chain", "fit.B", at::randn({kOut, kR}), [](auto& l, auto& B) { l.fit.B = B; }, plain,
      kMayMiss);
}

TEST(MergeRefusals, Anchors) {
  const at::Tensor A = at::randn({kR, kIn});
  const auto d = at::kDouble;
  const FitSums good{
      at::eye(kIn, d), at::randn({kR, kIn}, d), at::randn({kIn}, d), at::randn({kR}, d), 2.0, 10};
  const FitOptions options;
  refuses_tensors("solve_fit", "the anchor", A, [&](const at::Tensor& other) {
    solve_fit(good, A, options, "q", {{other}, {}});
  });
  refuses_call(
      "solve_fit", "factors",
      [&] {
        solve_fit(good, A, options, "q", {{A}, {1}});
      },
      "a factor of A and of each other; got 1 for 1 others");
  refuses_call(
      "solve_fit", "factors",
      [&] {
        solve_fit(good, A, options, "q", {{}, {NAN}});
      },
      "must be finite; got nan");
  of_factors("fit_anchor", [](const ChainView& view) { fit_anchor(view, 1); });
  refuses_call(
      "fit_anchor", "position", [] { fit_anchor(good_view(), 9); }, "9");
}

TEST(MergeRefusals, Sums) {
  const at::Tensor A = at::randn({kR, kIn});
  const auto d = at::kDouble;
  const FitSums good{
      at::eye(kIn, d), at::randn({kR, kIn}, d), at::randn({kIn}, d), at::randn({kR}, d), 2.0, 10};
  FitOptions options;
  options.affine = true;
  const auto with = [&](at::Tensor FitSums::*member) {
    return [&, member](const at::Tensor& tensor) {
      FitSums sums = good;
      sums.*member = tensor;
      solve_fit(sums, A, options, "q");
    };
  };
  refuses_tensors("solve_fit", "xx", good.xx, with(&FitSums::xx));
  refuses_tensors("solve_fit", "vx", good.vx, with(&FitSums::vx));
  refuses_tensors("solve_fit", "x_sum", good.x_sum, with(&FitSums::x_sum));
  refuses_tensors("solve_fit", "v_sum", good.v_sum, with(&FitSums::v_sum));
  refuses_tensors("solve_fit", "A", A, [&](auto& A) { solve_fit(good, A, options, "q"); });
  const auto changed = [&](const std::function<void(FitSums&)>& change) {
    return [&, change] {
      FitSums sums = good;
      change(sums);
      solve_fit(sums, A, options, "q");
    };
  };
  refuses_call("solve_fit", "float sums",
               changed([&](auto& sums) { sums.xx = good.xx.to(at::kFloat); }), "must be fp64");
  refuses_call("solve_fit", "vv", changed([](auto& sums) { sums.vv = -1; }), "not be negative");
  refuses_call("solve_fit", "the squares in xx", changed([&](auto& sums) { sums.xx = -good.xx; }),
               "not be negative; got -1");
  refuses_call("solve_fit", "rows", changed([](auto& sums) { sums.rows = -1; }), "got none");
  refuses_call(
      "solve_fit", "ridge", [&] { solve_fit(good, A, {0}, "q"); }, "ridge must be");
  FitSums larger = good;
  larger.xx = 40 * good.xx;
  refuses_call(
      "solve_fit", "a large ridge", [&] { solve_fit(larger, A, {1e308}, "q"); },
      "must be finite; got 1e+308 times 16 (layer q): lower ridge");
}

TEST(MergeRefusals, Collectors) {
  of_factors("FitCollector::FitCollector", [](const ChainView& view) { FitCollector({view}); });
  refuses_call(
      "FitCollector::FitCollector", "ridge", [] { FitCollector({good_view()}, {NAN}); },
      "ridge must be");
  const at::Tensor x = at::randn({3, kIn}), v = at::randn({3, kR});
  FitCollector collector({good_view()});
  refuses_tensors("FitCollector::add", "x", x, [&](auto& x) { collector.add(0, 1, x, v); },
                  {Wrong::kDims});
  refuses_tensors("FitCollector::add", "v", v, [&](auto& v) { collector.add(0, 1, x.clone(), v); },
                  {Wrong::kDims});
  refuses_positions("FitCollector::add", "chain", 1, [&](int64_t c) { collector.add(c, 0, x, v); });
  refuses_positions("FitCollector::add", "position", 3, [&](int64_t n) {
    collector.add(0, n, at::randn({3, kIn}), v);
  });
  refuses_positions("FitCollector::sums", "chain", 1, [&](int64_t c) { collector.sums(c, 0); });
  refuses_positions("FitCollector::sums", "position", 3, [&](int64_t n) { collector.sums(0, n); });
  refuses_tensors("FitCollector::begin_batch", "masks", at::ones({3}, at::kBool),
                  [&](auto& mask) { collector.begin_batch({mask}); },
                  {Wrong::kUndefined, Wrong::kEmpty, Wrong::kColumns, Wrong::kDims, Wrong::kDtype});
  FitCollector unseen({good_view()});
  refuses_call(
      "FitCollector::finish_pass", "no rows", [&] { unseen.finish_pass(); }, "got none");
  refuse_nothing({"FitCollector::end_batch", "FitCollector::views", "FitCollector::cost",
                  "FitCollector::padding_warning", "FitCollector::operator="});
}

TEST(FitCollector, RefusesLayersWithoutFeatures) {
  // Rows of nothing cannot be counted; the count was a division by zero.
  const Chain chain(ResLoraConfig().res_mode("ms"), {{"a", 0, 4, 2, 1}, {"b", 0, 4, 2, 1}});
  const LayerView layer{at::zeros({4, 0}), at::zeros({2, 0}), at::zeros({4, 2}), {}};
  FitCollector collector({ChainView{chain, {layer, layer}}});
  refuses_call(
      "FitCollector::add", "rows",
      [&] {
        collector.add(0, 1, at::zeros({3, 0}), at::zeros({2, 2}));
      },
      "the same rows");
}

TEST(MergeRefusals, MovedTaps) {
  const Call move = [](const ChainView& view) { move_taps(view); };
  const Call choose = [](const ChainView& view) {
    choose_moves({view},
                 [](int64_t count, const PlanOf&) { return std::vector<double>(count, 1); });
  };
  of_factors("move_taps", move);
  of_fits("move_taps", move);
  refuses_call(
      "move_taps", "share", [] { move_taps(good_view(), NAN); }, "share must be");
  of_factors("choose_moves", choose);
  of_fits("choose_moves", choose);
  refuses_call(
      "choose_moves", "measure", [] { choose_moves({good_view()}, nullptr); }, "got none");
  refuses_call(
      "choose_moves", "distances",
      [] {
        choose_moves({good_view()}, [](int64_t, const PlanOf&) { return std::vector<double>(1); });
      },
      "one distance for each");
  of_fits(
      "has_moved_taps", [](const ChainView& view) { has_moved_taps(view); }, kMayMiss);
  refuses_call(
      "has_moved_taps", "a view", [] { has_moved_taps(short_view()); }, "got 2 for 3");
  refuses_call(
      "few_rows_warning", "a view", [] { few_rows_warning({short_view()}); }, "got 2 for 3");
}

TEST(MergeRefusals, Masks) {
  const at::Tensor mask = at::ones({2, 3}, at::kBool), rows = at::randn({3, 4});
  const std::set<Wrong> other_masks = {Wrong::kEmpty, Wrong::kColumns, Wrong::kDims, Wrong::kDtype};
  std::set<Wrong> or_none = other_masks;
  or_none.insert(Wrong::kUndefined);
  refuses_tensors(
      "padding_masks", "masks", mask, [](auto& m) { padding_masks({m}, "op"); }, or_none);
  refuses_call(
      "padding_masks", "values", [&] { padding_masks({rows}, "op"); }, "must hold 1");
  std::set<Wrong> or_meta = other_masks;
  or_meta.insert(Wrong::kMeta);  // sizes are asked for only
  refuses_tensors(
      "row_mask", "masks", mask,
      [](auto& m) {
        row_mask({m}, {2, 3});
      },
      or_meta);
  refuses_tensors("error_sum", "reference", rows, [&](auto& r) { error_sum(r, rows); });
  refuses_tensors("error_sum", "other", rows, [&](auto& other) { error_sum(rows, other); });
  refuses_call(
      "check_current", "another adapter", [] { check_current("a", "b", "op", "stop"); }, "or stop");
}

}  // namespace
}  // namespace reslora
