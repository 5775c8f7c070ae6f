// Rules of calibration: which rows are padding, and the search for the taps to move.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <reslora/calibration.h>
#include <reslora/regression.h>

#include <limits>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// ---- padding

TEST(PaddingMasks, AreBoolAndUndefinedOnesAreLeftOut) {
  const Tensor mask = at::tensor({1, 1, 0, 1, 0, 0}, at::kLong).view({2, 3});
  const auto masks = padding_masks({Tensor(), mask, mask == 1}, "test");
  ASSERT_EQ(masks.size(), 2U);
  EXPECT_EQ(masks[0].scalar_type(), at::kBool);
  EXPECT_TRUE(at::equal(masks[0], mask == 1));
  EXPECT_TRUE(padding_masks({}, "test").empty());
}

TEST(PaddingMasks, RefuseOtherValuesAndTwoThatCannotBeToldApart) {
  const Tensor mask = at::tensor({1, 0}, at::kFloat).view({1, 2});
  EXPECT_TRUE(refuses([&] { padding_masks({1 - 1e9 * mask}, "merge_report"); },
                      "[merge_report] a mask [batch, tokens] must hold 1 for tokens and 0 for "
                      "padding; got values from -1e+09 to 1"));
  EXPECT_TRUE(refuses(
      [&] {
        padding_masks({mask, 1 - mask}, "calibrate");
      },
      "must differ in length to tell whose rows are whose; got [1, 2] for both"));
  EXPECT_NO_THROW(padding_masks({mask, at::zeros({1, 3})}, "calibrate"));
}

TEST(RowMask, BelongsToRowsOfItsShapeAndToFlatOnes) {
  const Tensor first = random({2, 3}, 1) > 0, second = random({2, 5}, 2) > 0;
  const std::vector<Tensor> masks = {first, second};
  const auto flat = [](const Tensor& mask) { return mask.reshape({-1}); };
  EXPECT_TRUE(at::equal(*row_mask(masks, {2, 3}), flat(first)));
  EXPECT_TRUE(at::equal(*row_mask(masks, {2, 5}), flat(second)));
  EXPECT_TRUE(at::equal(*row_mask(masks, {10}), flat(second)));
  for (const std::vector<int64_t>& other : {std::vector<int64_t>{3, 2}, {2, 4}, {7}, {2, 3, 1}, {}})
    EXPECT_FALSE(row_mask(masks, other).has_value());
  EXPECT_FALSE(row_mask({}, {2, 3}).has_value());
}

// ---- which taps are moved

/// A chain of three layers with fits where merging is an approximation.
ChainView chain_of(const std::string& res_mode, uint64_t seed) {
  const auto blocks = random_blocks({/*size=*/3}, seed);
  const auto config = ResLoraConfig().r(3).res_mode(res_mode).pre_num(1);
  ChainView view{Chain(config, testing::shapes_of(blocks)), {}};
  for (int64_t n = 0; n < 3; ++n) {
    Fit fit;
    if (!view.chain.merges_exactly(n)) fit.A = random({3, 6}, seed * 100 + 7 + n), fit.rows = 9;
    view.layers.push_back({blocks[n].W, blocks[n].A, blocks[n].B, {}, blocks[n].bias, fit});
  }
  return view;
}

/// Chains of which the middle one merges exactly.
std::vector<ChainView> chains() {
  return {chain_of("ms", 1), chain_of("none", 2), chain_of("is", 3), chain_of("ms", 4)};
}

/// Whether the taps of each chain are moved in a plan for `chains`.
std::vector<bool> moved_in(const MergePlan& plan) {
  std::vector<bool> moved;
  for (size_t i = 0; i < plan.layers().size(); i += 3)
    moved.push_back(plan.layers()[i].A.size(0) + plan.layers()[i + 1].A.size(0) > 6);
  return moved;
}

/// Chooses by distances that are given: alone (plain first), then together.
MovedTaps chosen(const std::vector<double>& alone, const std::vector<double>& together) {
  int64_t calls = 0;
  return choose_moves(chains(), [&](int64_t count, const PlanOf&) {
    const std::vector<double>& found = calls++ == 0 ? alone : together;
    EXPECT_TRUE(found.empty() || static_cast<int64_t>(found.size()) == count) << "asks once more";
    return found;
  });
}

bool is_plain(const MovedTaps& moved) {
  const auto plain = chains();
  bool is_same = moved.chains.empty() && moved.before == 0 && moved.after == 0;
  for (size_t i = 0; i < plain.size(); ++i)
    for (size_t n = 0; n < 3; ++n) {
      const Fit& fit = plain[i].layers[n].fit;
      const Fit& own = moved.fits.at(i).at(n);
      is_same &= own.A.defined() == fit.A.defined() && !own.B.defined();
      is_same = is_same && (!fit.A.defined() || at::equal(own.A, fit.A));
    }
  return is_same;
}

TEST(ChooseMoves, TriesEachLinkedChainAloneAndTheNearerOnesTogether) {
  std::vector<std::vector<bool>> tried;
  const MovedTaps moved = choose_moves(chains(), [&](int64_t count, const PlanOf& plan_of) {
    for (int64_t k = 0; k < count; ++k) tried.push_back(moved_in(plan_of(k)));
    return count == 4 ? std::vector<double>{3, 2, 4, 2.5} : std::vector<double>{3.5, 1};
  });
  const std::vector<std::vector<bool>> wanted = {
      {false, false, false, false}, {true, false, false, false},  {false, false, true, false},
      {false, false, false, true},  {false, false, false, false}, {true, false, false, true}};
  EXPECT_EQ(tried, wanted);
  EXPECT_EQ(moved.chains, (std::vector<int64_t>{0, 3}));
  EXPECT_EQ(moved.before, 3.5);
  EXPECT_EQ(moved.after, 1);
  std::vector<ChainView> views = chains();
  const std::vector<Fit> half = move_taps(views[3], 0.5);
  for (size_t n = 0; n < 3; ++n) {
    EXPECT_TRUE(all_close(moved.fits[3][n].A, half[n].A));
    EXPECT_TRUE(all_close(moved.fits[3][n].B, half[n].B));
    views[3].layers[n].fit = half[n];
  }
  EXPECT_TRUE(has_moved_taps(views[3]));
  EXPECT_FALSE(has_moved_taps(views[2]));
  EXPECT_FALSE(has_moved_taps(views[1]));
}

TEST(ChooseMoves, MovesNothingThatComesNoNearer) {
  EXPECT_TRUE(is_plain(chosen({3, 3, 4, 5}, {})));
  EXPECT_TRUE(is_plain(chosen({3, 2, 4, 2}, {3, 3})));
  EXPECT_EQ(chosen({3, 2, 4, 5}, {3, 2}).chains, (std::vector<int64_t>{0}));
}

TEST(ChooseMoves, MovesNothingByDistancesThatAreNotFinite) {
  for (const double odd : {kNan, kInf}) {
    EXPECT_TRUE(is_plain(chosen({odd, 2, 2, 2}, {3, 1}))) << odd;
    EXPECT_TRUE(is_plain(chosen({3, 2, 2, 2}, {odd, 1}))) << odd;
    EXPECT_TRUE(is_plain(chosen({3, odd, odd, odd}, {3, 1}))) << odd;
    EXPECT_TRUE(is_plain(chosen({3, 2, 2, 2}, {3, odd}))) << odd;
    EXPECT_EQ(chosen({3, odd, 2, odd}, {3, 1}).chains, (std::vector<int64_t>{2})) << odd;
  }
}

TEST(ChooseMoves, MovesNothingWhereOutputsCannotBeCompared) {
  EXPECT_TRUE(is_plain(chosen({}, {3, 1})));
  EXPECT_TRUE(is_plain(chosen({3, 2, 2, 2}, {})));
}

TEST(ChooseMoves, MeasuresNothingWhereAllChainsMergeExactly) {
  const MoveMeasure never = [](int64_t, const PlanOf&) -> std::vector<double> {
    throw std::logic_error("measured");
  };
  EXPECT_TRUE(choose_moves({chain_of("none", 1), chain_of("bs", 2)}, never).chains.empty());
  EXPECT_THROW(choose_moves(chains(), never), std::logic_error);
  EXPECT_TRUE(refuses(
      [] { choose_moves(chains(), [](int64_t, const PlanOf&) { return std::vector<double>{1}; }); },
      "must give one distance for each candidate; got 1 for 4"));
}

// ---- warnings

TEST(FewRows, AreReportedOnceWithTheFirstLayer) {
  auto views = chains();
  EXPECT_EQ(few_rows_warning(views), "");
  views[2].layers[1].fit.rows = 5;
  views[3].layers[2].fit.rows = 1;
  EXPECT_EQ(few_rows_warning(views),
            "[calibrate] 2 layers saw fewer rows than they have features (5 of 6 in layer.1): the "
            "ridge carries the fit; more batches make it better");
}

TEST(FitCollector, TellsOfLayersWhosePaddingWasFitted) {
  FitCollector collector({chain_of("ms", 1)});
  const auto add = [&](std::vector<int64_t> sizes) {
    for (const int64_t n : {1, 2}) {
      sizes.back() = 6;
      const Tensor x = random(sizes, 5);
      sizes.back() = 3;
      collector.add(0, n, x, random(sizes, 6));
    }
  };
  collector.begin_batch({at::ones({2, 3}, at::kBool)});
  add({2, 4, 0});  // of another shape, but nothing is padded
  collector.end_batch();
  EXPECT_EQ(collector.padding_warning(), "");
  collector.begin_batch({at::tensor({1, 1, 0}, at::kLong).repeat({2, 1})});
  add({2, 3, 0});
  collector.end_batch();
  add({2, 4, 0});  // the masks ended with their batch
  EXPECT_EQ(collector.padding_warning(), "");
  collector.begin_batch({at::tensor({1, 1, 0}, at::kLong).repeat({2, 1})});
  add({2, 4, 0});
  EXPECT_EQ(collector.padding_warning(),
            "[calibrate] the rows of 2 layers have another shape than the attention mask, so their "
            "padding was fitted too (layer.1, ...)");
  collector.finish_pass();
  EXPECT_EQ(collector.views()[0].layers[1].fit.rows, 8 + 4 + 8 + 8);
}

}  // namespace
}  // namespace reslora
