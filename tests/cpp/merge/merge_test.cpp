// Plan, apply and revert: every rule against the formulas, exact bits, and clean refusals.
#include <ATen/autocast_mode.h>
#include <reslora/merge.h>
#include <reslora/plain_lora.h>

#include <cmath>
#include <stdexcept>

#include "testing.h"

namespace reslora {
namespace {

using formulas::Block;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

/// A window whose mean |x|_F is `input` and whose mean |A x|_F is `product`; half filled.
NormWindow window(double input, double product) {
  const at::Tensor norms =
      at::tensor({input - 0.5, input + 0.5, 1e9, 1e9, product - 0.25, product + 0.25, 1e9, 1e9},
                 at::kFloat)
          .view({2, 4});
  return {norms, at::full({1}, 2, at::kLong)};
}

double input_norm(int64_t n) { return 2.0 + static_cast<double>(n * n); }
double product_norm(int64_t n) { return 9.0 - static_cast<double>(n); }

ChainView view_of(const std::vector<Block>& blocks, const std::string& mode, int64_t m,
                  at::ScalarType dtype = at::kDouble, bool has_norms = true) {
  ChainView view{Chain(ResLoraConfig().res_mode(mode).pre_num(m), testing::shapes_of(blocks)), {}};
  for (size_t n = 0; n < blocks.size(); ++n) {
    const auto index = static_cast<int64_t>(n);
    view.layers.push_back(
        {blocks[n].W.to(dtype, false, true), blocks[n].A, blocks[n].B,
         has_norms ? window(input_norm(index), product_norm(index)) : NormWindow()});
  }
  return view;
}

std::vector<at::Tensor> weights_of(const ChainView& view) {
  std::vector<at::Tensor> copies;
  for (const LayerView& layer : view.layers) copies.push_back(layer.weight.clone());
  return copies;
}

::testing::AssertionResult is_untouched(const ChainView& view, const std::vector<at::Tensor>& old) {
  for (size_t n = 0; n < old.size(); ++n) {
    if (!at::equal(view.layers[n].weight, old[n])) {
      return ::testing::AssertionFailure() << "layer " << n << " has changed";
    }
  }
  return ::testing::AssertionSuccess();
}

// ---- every rule, written out with formulas and loops of its own

struct RuleCase {
  const char* mode;
  int64_t m;
  const char* rule;
};

double frobenius(const at::Tensor& matrix) { return matrix.pow(2).sum().sqrt().item<double>(); }

/// alpha* of layer n towards layer n-k, from the text of the paper.
double expected_alpha(const RuleCase& c, int64_t n, int64_t k,
                      const std::vector<at::Tensor>& merged) {
  const std::string rule = c.rule;
  if (rule == "weight")
    return n - k - 1 < 0 ? 1 : frobenius(merged[n - k - 1]) / frobenius(merged[n - 1]);
  if (rule == "input" && std::string(c.mode) == "ms") return product_norm(n - k) / product_norm(n);
  return input_norm(n - k) / input_norm(n);
}

std::vector<at::Tensor> expected_weights(const RuleCase& c, const std::vector<Block>& blocks) {
  const std::string mode = c.mode;
  std::vector<at::Tensor> merged;
  for (int64_t n = 0; n < static_cast<int64_t>(blocks.size()); ++n) {
    const int64_t m = mode == "is" ? 1 : c.m;
    std::vector<double> alpha;
    for (int64_t k = 1; k <= (m == -1 ? n : std::min(m, n)); ++k) {
      alpha.push_back(expected_alpha(c, n, k, merged));
    }
    if (mode == "none") merged.push_back(formulas::merged_none(blocks[n]));
    if (mode == "bs") merged.push_back(formulas::merged_bs(blocks, n, c.m));
    if (mode == "is") merged.push_back(formulas::merged_is(blocks[n], n == 0 ? 1 : alpha[0]));
    if (mode == "ms" && std::string(c.rule) == "input") {
      merged.push_back(formulas::merged_ms_input(blocks[n], alpha));
    } else if (mode == "ms") {
      merged.push_back(formulas::merged_ms_weight(blocks, n, alpha));
    }
  }
  return merged;
}

class MergeRules : public ::testing::TestWithParam<RuleCase> {};

TEST_P(MergeRules, WriteWhatTheFormulasSay) {
  const RuleCase c = GetParam();
  const std::vector<Block> blocks = random_blocks({5, 6, 4, 3, false});
  const std::vector<at::Tensor> expected = expected_weights(c, blocks);
  const ChainView view = view_of(blocks, c.mode, c.m);
  const std::vector<at::Tensor> old = weights_of(view);
  MergePlan plan({view}, c.rule);
  EXPECT_TRUE(is_untouched(view, old));
  ASSERT_EQ(plan.layers().size(), 5U);
  EXPECT_FALSE(plan.fell_back_to_weight());
  plan.apply();
  for (size_t n = 0; n < 5; ++n) {
    EXPECT_TRUE(all_close(view.layers[n].weight, expected[n])) << "layer " << n;
    EXPECT_TRUE(
        all_close(old[n] + at::matmul(plan.layers()[n].B, plan.layers()[n].A), expected[n]));
  }
  plan.revert();
  EXPECT_TRUE(is_untouched(view, old));
}

std::vector<RuleCase> rule_cases() {
  std::vector<RuleCase> cases = {{"is", 1, "input"}, {"is", 1, "weight"}, {"is", 1, "factored"}};
  for (const int64_t m : {-1, 0, 1, 2, 9}) {
    cases.push_back({"bs", m, "exact"});
    for (const char* rule : {"input", "weight", "factored"}) cases.push_back({"ms", m, rule});
  }
  for (const char* rule : {"exact", "input", ""}) cases.push_back({"none", 1, rule});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Merge, MergeRules, ::testing::ValuesIn(rule_cases()));

TEST(Merge, ReportsRuleAndAlphaStarOfEachLayer) {
  const MergePlan plan({view_of(random_blocks({}), "ms", 2)}, "input");
  EXPECT_EQ(plan.layers()[0].name, "layer.0");
  EXPECT_EQ(plan.layers()[0].rule, MergeRule::kExact);
  EXPECT_TRUE(plan.layers()[0].alpha_star.empty());
  EXPECT_EQ(plan.layers()[3].rule, MergeRule::kInput);
  ASSERT_EQ(plan.layers()[3].alpha_star.size(), 2U);
  EXPECT_NEAR(plan.layers()[3].alpha_star[0], 7.0 / 6, 1e-12);  // nearest first
  EXPECT_NEAR(plan.layers()[3].alpha_star[1], 8.0 / 6, 1e-12);
}

TEST(Merge, UnlinkedLayersMergeExactlyWithTheirOwnScaling) {
  std::vector<Block> blocks = random_blocks({4, 6, 6, 3, false});
  blocks[2] = random_blocks({1, 5, 6, 2, false})[0];  // other in_features
  const ChainView view = view_of(blocks, "is", 1);
  MergePlan plan({view}, "input");
  EXPECT_EQ(plan.layers()[2].rule, MergeRule::kExact);
  EXPECT_EQ(plan.layers()[3].rule, MergeRule::kExact);
  plan.apply();
  for (const size_t n : {2U, 3U}) {
    EXPECT_TRUE(all_close(view.layers[n].weight, formulas::merged_none(blocks[n])));
  }
}

TEST(Merge, BlockShortcutStacksBlocksOfDifferentRank) {
  std::vector<Block> blocks = random_blocks({3, 6, 6, 3, false});
  blocks[1] = random_blocks({1, 6, 6, 5, false}, 8)[0];
  const MergePlan plan({view_of(blocks, "bs", -1)}, "exact");
  EXPECT_EQ(plan.layers()[2].A.size(0), 3 + 5 + 3);
}

TEST(Merge, EmptyPlanAndSeveralChains) {
  MergePlan empty({}, "");
  EXPECT_NO_THROW(empty.apply());
  const std::vector<Block> blocks = random_blocks({3, 6, 6, 3, false});
  const ChainView first = view_of(blocks, "is", 1);
  const ChainView second = view_of(random_blocks({3, 6, 6, 3, false}, 8), "is", 1);
  MergePlan both({first, second}, "weight");
  const MergePlan alone({second}, "weight");
  ASSERT_EQ(both.layers().size(), 6U);
  EXPECT_EQ(both.layers()[5].alpha_star, alone.layers()[2].alpha_star);  // chains do not mix
}

// ---- the default rule

TEST(MergeDefault, TakesInputWhereAllNormsAreThere) {
  const MergePlan plan({view_of(random_blocks({}), "is", 1)}, "");
  EXPECT_FALSE(plan.fell_back_to_weight());
  EXPECT_EQ(plan.layers()[4].rule, MergeRule::kInput);
}

TEST(MergeDefault, FallsBackToWeightAndSaysSo) {
  for (const size_t empty : {0U, 2U, 4U}) {
    ChainView view = view_of(random_blocks({}), "is", 1);
    view.layers[empty].norms = NormWindow(4, at::kCPU);
    const MergePlan plan({view}, "");
    EXPECT_TRUE(plan.fell_back_to_weight()) << "layer " << empty;
    EXPECT_EQ(plan.layers()[4].rule, MergeRule::kWeight);
  }
}

TEST(MergeDefault, NeedsNoNormsForExactChains) {
  const MergePlan plan({view_of(random_blocks({}), "bs", 2, at::kDouble, false)}, "");
  EXPECT_FALSE(plan.fell_back_to_weight());
  EXPECT_EQ(plan.layers()[4].rule, MergeRule::kExact);
}

// ---- weights

class MergeDtype : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(MergeDtype, ComputesInFullPrecisionCastsOnceAndRevertsTheBits) {
  const std::vector<Block> blocks = random_blocks({3, 8, 5, 2, false});
  const ChainView view = view_of(blocks, "bs", 1, GetParam());
  const std::vector<at::Tensor> old = weights_of(view);
  MergePlan plan({view}, "");
  plan.apply();
  for (size_t n = 0; n < 3; ++n) {
    std::vector<Block> cast = blocks;
    cast[n].W = old[n].to(at::kDouble);
    const at::Tensor exact = formulas::merged_bs(cast, static_cast<int64_t>(n), 1);
    EXPECT_EQ(view.layers[n].weight.scalar_type(), GetParam());
    // One rounding to the weight's dtype, and fp32 arithmetic before it.
    const double step = std::pow(2.0, GetParam() == at::kBFloat16 ? -8
                                      : GetParam() == at::kHalf   ? -11
                                      : GetParam() == at::kFloat  ? -22
                                                                  : -48);
    const at::Tensor error = (view.layers[n].weight.to(at::kDouble) - exact).abs();
    EXPECT_TRUE((error <= 1.01 * step * exact.abs() + 1e-6).all().item<bool>()) << "layer " << n;
  }
  plan.revert();
  EXPECT_TRUE(is_untouched(view, old));
}

INSTANTIATE_TEST_SUITE_P(Merge, MergeDtype,
                         ::testing::Values(at::kDouble, at::kFloat, at::kHalf, at::kBFloat16));

TEST(MergeApply, WritesThroughATransposedView) {
  const std::vector<Block> blocks = random_blocks({2, 6, 4, 3, false});
  ChainView view = view_of(blocks, "bs", 0);
  const at::Tensor stored = blocks[1].W.t().contiguous();  // [in, out], as Conv1D keeps it
  const at::Tensor old = stored.clone();
  view.layers[1].weight = stored.t();
  MergePlan plan({view}, "exact");
  plan.apply();
  EXPECT_TRUE(all_close(stored.t(), formulas::merged_none(blocks[1])));
  plan.revert();
  EXPECT_TRUE(at::equal(stored, old));
}

TEST(MergeApply, LeavesGradientFlagsAloneAndBumpsTheVersion) {
  const ChainView view = view_of(random_blocks({}), "bs", 1);
  for (const LayerView& layer : view.layers) layer.A.requires_grad_(true);
  view.layers[0].weight.requires_grad_(true);
  const auto version = view.layers[0].weight._version();
  MergePlan plan({view}, "");
  plan.apply();
  EXPECT_TRUE(view.layers[0].weight.is_leaf());
  EXPECT_GT(view.layers[0].weight._version(), version);
  EXPECT_FALSE(plan.layers()[0].A.requires_grad());
}

TEST(MergeApply, IgnoresAutocast) {
  const ChainView view = view_of(random_blocks({}), "ms", 2, at::kFloat);
  const ChainView other = view_of(random_blocks({}), "ms", 2, at::kFloat);
  MergePlan({view}, "weight").apply();
  const bool was_enabled = at::autocast::is_autocast_enabled(at::kCPU);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  MergePlan({other}, "weight").apply();
  at::autocast::set_autocast_enabled(at::kCPU, was_enabled);
  EXPECT_TRUE(is_untouched(other, weights_of(view)));
}

TEST(MergeApply, FactorsDoNotFollowLaterTraining) {
  for (const char* mode : {"none", "is", "ms", "bs"}) {
    std::vector<Block> blocks = random_blocks({});
    for (Block& block : blocks) block.A = block.A.to(at::kFloat), block.B = block.B.to(at::kFloat);
    const MergePlan plan({view_of(blocks, mode, 1)}, "");
    EXPECT_EQ(plan.layers()[1].A.scalar_type(), at::kFloat);
    const at::Tensor A = plan.layers()[1].A.clone();
    const at::Tensor B = plan.layers()[1].B.clone();
    for (Block& block : blocks) block.A.zero_(), block.B.zero_();
    EXPECT_TRUE(at::equal(plan.layers()[1].A, A)) << mode;
    EXPECT_TRUE(at::equal(plan.layers()[1].B, B)) << mode;
  }
}

TEST(MergeApply, OnceAtATimeAndAgainAfterRevert) {
  const ChainView view = view_of(random_blocks({}), "is", 1);
  const std::vector<at::Tensor> old = weights_of(view);
  MergePlan plan({view}, "input");
  EXPECT_TRUE(refuses([&] { plan.revert(); }, "call apply first"));
  plan.apply();
  const std::vector<at::Tensor> merged = weights_of(view);
  EXPECT_TRUE(refuses([&] { plan.apply(); }, "call revert first"));
  EXPECT_TRUE(is_untouched(view, merged));
  plan.revert();
  EXPECT_FALSE(plan.is_applied());
  plan.apply();
  EXPECT_TRUE(is_untouched(view, merged));
  plan.revert();
  EXPECT_TRUE(is_untouched(view, old));
}

TEST(MergeApply, WithoutOriginalsThereIsNoWayBack) {
  const ChainView view = view_of(random_blocks({}), "is", 1);
  MergePlan plan({view}, "input");
  plan.apply(/*keep_originals=*/false);
  EXPECT_TRUE(plan.is_applied());
  EXPECT_TRUE(refuses([&] { plan.revert(); }, "originals, which were not kept"));
}

TEST(MergeApply, WithoutOriginalsAFailureIsGoneOnFrom) {
  const ChainView view = view_of(random_blocks({}), "is", 1);
  const std::vector<at::Tensor> old = weights_of(view);
  MergePlan whole({view}, "input");
  whole.apply();
  const std::vector<at::Tensor> merged = weights_of(view);
  whole.revert();
  MergePlan plan({view}, "input");
  const auto fail = [](int64_t done) {
    if (done == 2) throw std::runtime_error("full");
  };
  EXPECT_THROW(plan.apply(/*keep_originals=*/false, /*safe_merge=*/true, fail), std::runtime_error);
  EXPECT_EQ(plan.done(), 2);
  EXPECT_FALSE(plan.is_applied());
  EXPECT_TRUE(at::equal(view.layers[1].weight, merged[1]));
  EXPECT_TRUE(at::equal(view.layers[2].weight, old[2]));
  EXPECT_TRUE(refuses([&] { plan.apply(); }, "2 of 5 layers written"));
  EXPECT_TRUE(refuses([&] { plan.revert(); }, "only an applied plan"));
  plan.apply(/*keep_originals=*/false, /*safe_merge=*/true);
  EXPECT_TRUE(plan.is_applied());
  EXPECT_TRUE(is_untouched(view, merged));
}

TEST(MergeApply, RevertNeedsTheSameDtype) {
  const ChainView view = view_of(random_blocks({}), "is", 1, at::kFloat);
  MergePlan plan({view}, "input");
  plan.apply();
  view.layers[1].weight.set_data(view.layers[1].weight.to(at::kHalf));
  EXPECT_TRUE(refuses([&] { plan.revert(); }, "got Half [6, 6] for Float [6, 6] (layer layer.1)"));
  EXPECT_TRUE(plan.is_applied());
}

TEST(MergeApply, ProgressCountsLayersAndItsExceptionUndoesEverything) {
  const ChainView view = view_of(random_blocks({}), "is", 1);
  const std::vector<at::Tensor> old = weights_of(view);
  MergePlan plan({view}, "input");
  const auto stop_at_three = [](int64_t done) {
    if (done == 3) throw std::runtime_error("stop");
  };
  EXPECT_THROW(plan.apply(true, false, stop_at_three), std::runtime_error);
  EXPECT_FALSE(plan.is_applied());
  EXPECT_TRUE(is_untouched(view, old));
  std::vector<int64_t> seen;
  plan.apply(true, false, [&](int64_t done) { seen.push_back(done); });
  EXPECT_EQ(seen, (std::vector<int64_t>{1, 2, 3, 4, 5}));
}

TEST(MergeApply, SafeMergeChecksEverythingBeforeTheFirstWrite) {
  for (const double bad : {std::nan(""), 1e30}) {
    std::vector<Block> blocks = random_blocks({});
    blocks[4].B[0][0] = bad;  // 1e30 is finite until it is cast to fp16
    const ChainView view = view_of(blocks, "is", 1, at::kHalf);
    const std::vector<at::Tensor> old = weights_of(view);
    MergePlan plan({view}, "input");
    const char* sentence = std::isnan(bad) ? "an adapter must be finite; got NaN or infinity"
                                           : "NaN or infinity in Half (layer layer.4)";
    EXPECT_TRUE(refuses([&] { plan.apply(true, true); }, sentence));
    EXPECT_TRUE(is_untouched(view, old));
    EXPECT_FALSE(plan.is_applied());
  }
  MergePlan good({view_of(random_blocks({}), "is", 1)}, "input");
  EXPECT_NO_THROW(good.apply(true, true));
}

// ---- refusals

/// A plan whose apply must refuse layer 3, with nothing changed before it.
void expect_apply_refused(const at::Tensor& weight, const std::string& sentence) {
  ChainView view = view_of(random_blocks({}), "is", 1);
  const std::vector<at::Tensor> old = weights_of(view);
  view.layers[3].weight = weight;
  MergePlan plan({view}, "input");
  EXPECT_TRUE(refuses([&] { plan.apply(); }, sentence));
  EXPECT_FALSE(plan.is_applied());
  view.layers[3].weight = old[3];
  EXPECT_TRUE(is_untouched(view, old));
}

TEST(MergeRefuses, WeightsThatCannotTakeASum) {
  expect_apply_refused(at::zeros({6, 6}, at::kChar),
                       "dequantise it first; got Char (layer layer.3)");
  expect_apply_refused(at::zeros({18, 1}, at::kByte), "dequantise it first; got Byte");
  expect_apply_refused(at::Tensor(), "layer layer.3 has none");
  expect_apply_refused(at::zeros({6, 6}, at::TensorOptions().device(at::kMeta)),
                       "plain tensor in memory");
  expect_apply_refused(at::zeros({6, 7}), "weight must be [6, 6]; got [6, 7] (layer layer.3)");
}

TEST(MergeRefuses, AWeightSharedByTwoLayers) {
  ChainView view = view_of(random_blocks({}), "is", 1);
  view.layers[3].weight = view.layers[1].weight;
  MergePlan plan({view}, "input");
  EXPECT_TRUE(refuses([&] { plan.apply(); }, "shared by layer.1 and layer.3"));
}

TEST(MergeRefuses, RulesThatCannotServe) {
  const std::vector<Block> blocks = random_blocks({});
  const auto plan = [](const ChainView& view, const std::string& method) {
    return [=] { MergePlan({view}, method); };
  };
  EXPECT_TRUE(refuses(plan(view_of(blocks, "is", 1), "best"),
                      "or 'factored', or not given (the best for what is at hand); got 'best'"));
  EXPECT_TRUE(
      refuses(plan(view_of(blocks, "ms", 1), "exact"),
              "got a linked 'ms' layer (layer.1): use merge_method 'lsq', 'input' or 'weight'"));
  EXPECT_TRUE(refuses(plan(view_of(blocks, "is", 1, at::kDouble, false), "input"),
                      "layer layer.1 has none: train with norm_window > 0"));
  ChainView no_weights = view_of(blocks, "is", 1);
  for (LayerView& layer : no_weights.layers) layer.weight = at::Tensor();
  EXPECT_TRUE(refuses(plan(no_weights, "weight"), "rule 'weight' needs the base weight"));
  EXPECT_NO_THROW(plan(no_weights, "input")());
}

TEST(MergeRefuses, NormsThatCannotBeDividedBy) {
  ChainView view = view_of(random_blocks({}), "is", 1);
  view.layers[2].norms = NormWindow(at::zeros({2, 4}, at::kFloat), at::ones({1}, at::kLong));
  EXPECT_TRUE(refuses([&] { MergePlan({view}, "input"); }, "got 0 (layer layer.2)"));
  view.layers[2].norms =
      NormWindow(at::full({2, 4}, 1.0 / 0.0, at::kFloat), at::ones({1}, at::kLong));
  EXPECT_TRUE(refuses([&] { MergePlan({view}, "input"); }, "got inf (layer layer.2)"));
  std::vector<Block> blocks = random_blocks({});
  blocks[1].W.zero_();
  blocks[1].B.zero_();
  EXPECT_TRUE(
      refuses([&] { MergePlan({view_of(blocks, "is", 1)}, "weight"); }, "got 0 (layer layer.1)"));
}

TEST(MergeRefuses, AddingAdaptersOfDifferentInFeatures) {
  std::vector<Block> blocks = random_blocks({3, 6, 6, 3, false});
  blocks[1] = random_blocks({1, 8, 6, 3, false})[0];
  const ChainView view = view_of(blocks, "ms", 1);
  for (const char* rule : {"weight", "factored"}) {
    EXPECT_TRUE(
        refuses([&] { MergePlan({view}, rule); }, "adds A of layer layer.0 to A of layer layer.1"));
  }
  EXPECT_NO_THROW(MergePlan({view}, "input"));
}

TEST(MergeRefuses, TensorsThatDoNotFitTheChain) {
  ChainView view = view_of(random_blocks({}), "is", 1);
  view.layers[1].A = random({3, 7}, 1);
  EXPECT_TRUE(refuses([&] { MergePlan({view}, ""); },
                      "A must be a dense floating-point tensor [3, 6] in memory; got Double [3, 7] "
                      "(layer layer.1)"));
  view.layers[1].A = at::zeros({3, 6}, at::kInt);
  EXPECT_TRUE(refuses([&] { MergePlan({view}, ""); }, "A must be a dense floating-point tensor"));
  view.layers.pop_back();
  EXPECT_TRUE(refuses([&] { MergePlan({view}, ""); }, "got 4 for 5 layers"));
}

TEST(PaddedFactors, KeepTheProduct) {
  const MergePlan plan({view_of(random_blocks({3, 6, 4, 3, false}), "is", 1)}, "input");
  const LayerMerge& layer = plan.layers()[1];
  const auto [A, B] = padded_factors(layer, 5);
  EXPECT_EQ(A.sizes(), at::IntArrayRef({5, 6}));
  EXPECT_EQ(B.sizes(), at::IntArrayRef({4, 5}));
  EXPECT_TRUE(all_close(at::matmul(B, A), at::matmul(layer.B, layer.A)));
  EXPECT_EQ(A.narrow(0, 3, 2).abs().sum().item<double>(), 0);
  EXPECT_TRUE(refuses([&] { padded_factors(layer, 2); }, "at least the layer's rank 3; got 2"));
}

TEST(MergeRule, NamesGoBothWays) {
  for (const char* name : {"exact", "input", "weight", "factored"}) {
    EXPECT_EQ(merge_rule_name(parse_merge_rule(name)), name);
  }
}

// ---- fits

/// An "is" chain whose linked layers have affine fits of random numbers.
ChainView fitted_view(at::ScalarType dtype = at::kDouble) {
  const std::vector<Block> blocks = random_blocks({3, 6, 4, 3, true});
  ChainView view = view_of(blocks, "is", 1, dtype);
  for (size_t n = 0; n < 3; ++n) {
    view.layers[n].bias = blocks[n].bias.to(dtype, false, true);
    if (n == 0) continue;
    view.layers[n].fit = {random({3, 6}, 90 + n),
                          {},
                          random({3, 6}, 95 + n),
                          random({3}, 99 + n),
                          0.1,
                          0.25,
                          0.125,
                          20};
  }
  return view;
}

TEST(MergeLsq, IsTheDefaultAndTakesTheFitWithTheLayersOwnB) {
  for (const char* rule : {"lsq", ""}) {
    const ChainView view = fitted_view();
    const MergePlan plan({view}, rule, /*use_affine=*/false);
    EXPECT_EQ(plan.layers()[0].rule, MergeRule::kExact);
    EXPECT_EQ(plan.layers()[2].rule, MergeRule::kLsq);
    EXPECT_FALSE(plan.layers()[0].residual.has_value());
    EXPECT_EQ(plan.layers()[2].residual, 0.25);
    EXPECT_FALSE(plan.layers()[2].bias.defined());
    EXPECT_TRUE(at::equal(plan.layers()[2].A, view.layers[2].fit.A));
    EXPECT_TRUE(all_close(plan.layers()[1].B, 0.75 * view.layers[1].B));  // scaling of layer 1
  }
}

TEST(MergeLsq, AnAffineFitMovesTheBiasAndComesBackToTheBit) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    const ChainView view = fitted_view(dtype);
    const LayerView& layer = view.layers[1];
    const at::Tensor weight = layer.weight.clone();
    const at::Tensor bias = layer.bias.clone();
    MergePlan plan({view}, "");
    EXPECT_EQ(plan.layers()[1].residual, 0.125);
    plan.apply();
    const at::Tensor added = 0.75 * at::mm(layer.B, layer.fit.affine_A);
    const at::Tensor offset = 0.75 * at::mv(layer.B, layer.fit.offset);
    const double tolerance = dtype == at::kDouble ? 1e-12 : 4e-3;
    EXPECT_TRUE(all_close(layer.weight, weight.to(at::kDouble) + added, tolerance));
    EXPECT_TRUE(all_close(layer.bias, bias.to(at::kDouble) + offset, tolerance));
    EXPECT_TRUE(at::equal(view.layers[0].bias, fitted_view(dtype).layers[0].bias));
    plan.revert();
    EXPECT_TRUE(at::equal(layer.weight, weight));
    EXPECT_TRUE(at::equal(layer.bias, bias));
  }
}

TEST(MergeLsq, ARefinedFitBringsItsOwnBAndNoBiasMeansNoOffset) {
  ChainView view = fitted_view();
  view.layers[1].fit.B = random({4, 3}, 5);
  view.layers[1].fit.refine_steps = 4;
  view.layers[1].bias = at::Tensor();
  const MergePlan plan({view}, "lsq");
  EXPECT_EQ(merge_rule_name(plan.layers()[1].rule), "refined");
  EXPECT_TRUE(all_close(plan.layers()[1].B, 0.75 * view.layers[1].fit.B));
  EXPECT_TRUE(at::equal(plan.layers()[1].A, view.layers[1].fit.A));
  EXPECT_FALSE(plan.layers()[1].bias.defined());
  EXPECT_TRUE(refuses([] { parse_merge_rule("refined"); }, "got 'refined'"));
}

TEST(MergeLsq, RefusesMissingAndMalformedFits) {
  ChainView view = fitted_view();
  view.layers[1].fit.affine_A = random({3, 7}, 1);
  EXPECT_TRUE(refuses([&] { MergePlan({view}, "lsq"); }, "got Double [3, 7] (layer layer.1)"));
  view.layers[1].fit = {};
  EXPECT_TRUE(refuses([&] { MergePlan({view}, "lsq"); }, "got none for layer layer.1"));
  EXPECT_EQ(MergePlan({view}, "").layers()[2].rule, MergeRule::kInput);
}

TEST(MergeApply, RevertsIntoTensorsThatHaveReplacedThoseOfThePlan) {
  const ChainView view = fitted_view(at::kFloat);
  MergePlan plan({view}, "");
  plan.apply();
  const std::vector<at::Tensor> merged = weights_of(view);
  std::vector<at::Tensor> weights = weights_of(view);
  std::vector<at::Tensor> biases;
  for (const LayerView& layer : view.layers) biases.push_back(layer.bias.clone());
  const at::Tensor good = weights[1];
  weights[1] = good.to(at::kHalf);
  EXPECT_TRUE(refuses([&] { plan.revert(weights, biases); }, "got Half [4, 6] for Float [4, 6]"));
  EXPECT_TRUE(refuses([&] { plan.revert({good}, biases); }, "got 1 and 3 for 3 layers"));
  weights[1] = good;
  plan.revert(weights, biases);
  const ChainView old = fitted_view(at::kFloat);
  for (size_t n = 0; n < 3; ++n) {
    EXPECT_TRUE(at::equal(weights[n], old.layers[n].weight));
    EXPECT_TRUE(at::equal(biases[n], old.layers[n].bias));
  }
  EXPECT_TRUE(is_untouched(view, merged));
  plan.apply();
  EXPECT_TRUE(at::equal(weights[1], merged[1]));
}

}  // namespace
}  // namespace reslora
