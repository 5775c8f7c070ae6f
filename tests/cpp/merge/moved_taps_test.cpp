// Taps moved to the layers that they read: exact where all outputs are added to one stream.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <reslora/merge.h>
#include <reslora/regression.h>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

constexpr int64_t kLayers = 5;

ChainView view_of(const std::string& res_mode, int64_t pre_num,
                  const std::string& first = "double") {
  const auto blocks = random_blocks({});
  const auto config = ResLoraConfig().r(3).res_mode(res_mode).pre_num(pre_num).first_block(first);
  ChainView view{Chain(config, testing::shapes_of(blocks)), {}};
  for (int64_t n = 0; n < kLayers; ++n) {
    Fit fit;
    if (!view.chain.merges_exactly(n)) {
      fit.A = random({3, 6}, 100 + static_cast<uint64_t>(n));
      fit.affine_A = random({3, 6}, 200 + static_cast<uint64_t>(n));
      fit.offset = random({3}, 300 + static_cast<uint64_t>(n));
      fit.rows = 9;
    }
    view.layers.push_back({blocks[n].W, blocks[n].A, blocks[n].B, {}, blocks[n].bias, fit});
  }
  return view;
}

std::vector<Tensor> inputs() {
  std::vector<Tensor> xs;
  for (uint64_t n = 0; n < kLayers; ++n) xs.push_back(random({7, 6}, 50 + n));
  return xs;
}

/// The sum over layers of s B (A x + taps), written out.
Tensor literal_sum(const ChainView& view, const std::vector<Tensor>& xs) {
  Tensor sum = at::zeros({7, 6}, at::kDouble);
  for (int64_t n = 0; n < kLayers; ++n) {
    const Tensor& A = view.layers[n].A;
    Tensor v = at::mm(xs[n], A.t());
    if (view.chain.shortcut() == Shortcut::kIs && n == 0 && view.chain.wiring(0).is_doubled)
      v = 2 * v;
    for (const int64_t j : view.chain.reached(n)) {
      const Tensor& read = view.chain.shortcut() == Shortcut::kIs ? A : view.layers[j].A;
      v = v + at::mm(xs[j], read.t());
    }
    sum = sum + view.chain.layer(n).scaling * at::mm(v, view.layers[n].B.t());
  }
  return sum;
}

Tensor fitted_sum(const ChainView& view, const std::vector<Fit>& fits,
                  const std::vector<Tensor>& xs, bool is_affine) {
  Tensor sum = at::zeros({7, 6}, at::kDouble);
  for (int64_t n = 0; n < kLayers; ++n) {
    const Fit& fit = fits[n];
    const bool has_offset = is_affine && fit.offset.defined();
    Tensor u = at::mm(xs[n], (has_offset ? fit.affine_A : fit.A).t());
    if (has_offset) u = u + fit.offset;
    sum = sum + view.chain.layer(n).scaling * at::mm(u, fit.B.t());
  }
  return sum;
}

struct Case {
  std::string res_mode;
  int64_t pre_num;
  std::string first;
};

class MovedTaps : public ::testing::TestWithParam<Case> {};

TEST_P(MovedTaps, WhollyMovedTheSumOfAllOutputsIsExact) {
  const ChainView view = view_of(GetParam().res_mode, GetParam().pre_num, GetParam().first);
  const auto xs = inputs();
  const auto fits = move_taps(view, 1.0);
  EXPECT_TRUE(all_close(fitted_sum(view, fits, xs, false), literal_sum(view, xs)));
  EXPECT_TRUE(all_close(fitted_sum(view, fits, xs, true), literal_sum(view, xs)));
}

TEST_P(MovedTaps, PartlyMovedTheSumIsMixedFromFitsAndTheExactOne) {
  const ChainView view = view_of(GetParam().res_mode, GetParam().pre_num, GetParam().first);
  const auto xs = inputs();
  for (const bool is_affine : {false, true}) {
    const Tensor none = fitted_sum(view, move_taps(view, 0.0), xs, is_affine);
    const Tensor mixed = 0.7 * none + 0.3 * literal_sum(view, xs);
    EXPECT_TRUE(all_close(fitted_sum(view, move_taps(view, 0.3), xs, is_affine), mixed));
  }
}

TEST_P(MovedTaps, MergeAsTheyStandAndAtMostDoubleTheRank) {
  ChainView view = view_of(GetParam().res_mode, GetParam().pre_num, GetParam().first);
  const auto fits = move_taps(view, 0.5);
  for (int64_t n = 0; n < kLayers; ++n) view.layers[n].fit = fits[n];
  MergePlan plan({view}, "lsq", /*use_affine=*/false);
  for (int64_t n = 0; n < kLayers; ++n) {
    EXPECT_LE(fits[n].A.size(0), 6);
    const Tensor wanted = view.chain.layer(n).scaling * at::mm(fits[n].B, fits[n].A);
    EXPECT_TRUE(all_close(at::mm(plan.layers()[n].B, plan.layers()[n].A), wanted));
  }
}

INSTANTIATE_TEST_SUITE_P(Shortcuts, MovedTaps,
                         ::testing::Values(Case{"is", 1, "double"}, Case{"is", 1, "plain"},
                                           Case{"ms", 1, "double"}, Case{"ms", 3, "double"},
                                           Case{"ms", -1, "double"}));

TEST(MoveTaps, RefusesALinkedLayerWithoutAFitAndSharesOutOfRange) {
  ChainView view = view_of("ms", 1);
  EXPECT_TRUE(refuses([&] { move_taps(view, 1.5); }, "share must be within 0 and 1; got 1.5"));
  view.layers[2].fit = {};
  EXPECT_TRUE(refuses([&] { move_taps(view, 0.5); }, "layer.2"));
}

TEST(MoveTaps, LeavesLayersOfAnotherWidthAlone) {
  auto blocks = random_blocks({});
  const auto config = ResLoraConfig().r(3).res_mode("ms").pre_num(1);
  blocks[1].B = random({4, 3}, 9);
  blocks[1].W = random({4, 6}, 8);
  ChainView view{Chain(config, testing::shapes_of(blocks)), {}};
  for (int64_t n = 0; n < kLayers; ++n) {
    Fit fit;
    if (n > 0) fit.A = random({3, 6}, 100 + static_cast<uint64_t>(n));
    view.layers.push_back({blocks[n].W, blocks[n].A, blocks[n].B, {}, {}, fit});
  }
  const auto fits = move_taps(view, 0.5);
  EXPECT_TRUE(all_close(fits[1].A, view.layers[1].fit.A));
  EXPECT_TRUE(all_close(fits[2].A.narrow(0, 0, 3), view.layers[2].fit.A));
  EXPECT_EQ(fits[0].A.size(0), 3);
  EXPECT_EQ(fits[2].A.size(0), 6);  // layer 3 reads it
}

}  // namespace
}  // namespace reslora
