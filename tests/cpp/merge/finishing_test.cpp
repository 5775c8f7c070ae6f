// The finish: plain LoRAs that compute what the fits do, with the layers' own step sizes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <reslora/finishing.h>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::all_close;
using testing::random;
using testing::refuses;

ChainView view_of(const std::string& res_mode, double alpha_star) {
  const auto blocks = testing::random_blocks({});
  const Chain chain(ResLoraConfig().r(3).res_mode(res_mode), testing::shapes_of(blocks));
  ChainView view{chain, {}};
  for (size_t n = 0; n < blocks.size(); ++n) {
    Fit fit;
    if (n > 0) fit.A = random({3, 6}, 100 + n);
    fit.alpha_star = alpha_star;
    view.layers.push_back({blocks[n].W, blocks[n].A, blocks[n].B, {}, {}, fit});
  }
  return view;
}

Tensor delta(const FinishedLayer& layer, const LayerView& own) {
  return layer.scaling * at::mm(layer.B.defined() ? layer.B : own.B, layer.A);
}

TEST(Finish, EveryLayerComputesItsFitAndTheFirstOneItsDoubledSelf) {
  for (const char* res_mode : {"is", "ms"}) {
    const ChainView view = view_of(res_mode, 0.7);
    const auto finished = finish_chain(view);
    for (int64_t n = 0; n < view.chain.size(); ++n) {
      const LayerView& own = view.layers[n];
      const double scaling = view.chain.layer(n).scaling;
      const Tensor plain = n == 0 && std::string(res_mode) == "is" ? 2 * own.A : own.A;
      const Tensor& A = n == 0 ? plain : own.fit.A;
      EXPECT_TRUE(all_close(delta(finished[n], own), scaling * at::mm(own.B, A), 1e-6));
    }
  }
}

TEST(Finish, ScalingGrowsByWhatEntersBWithinBounds) {
  const std::pair<double, double> cases[] = {{0.7, 1.7}, {-0.9, 0.5}, {30, 8}};
  for (const auto& [alpha_star, factor] : cases) {
    const ChainView view = view_of("is", alpha_star);
    const auto finished = finish_chain(view);
    EXPECT_DOUBLE_EQ(finished[0].scaling, 2 * view.chain.layer(0).scaling);
    EXPECT_DOUBLE_EQ(finished[1].scaling, factor * view.chain.layer(1).scaling);
  }
}

TEST(Finish, TakesTheFitsOwnB) {
  ChainView view = view_of("ms", 0);
  EXPECT_FALSE(finish_chain(view)[1].B.defined());
  view.layers[1].fit.B = random({6, 3}, 9);
  EXPECT_TRUE(at::equal(finish_chain(view)[1].B, view.layers[1].fit.B));
}

TEST(Finish, RefusesALinkedLayerWithoutAFitAndFitsOfAnotherRank) {
  ChainView view = view_of("is", 0);
  view.layers[2].fit.A = random({6, 6}, 1);
  view.layers[2].fit.B = random({6, 6}, 2);
  EXPECT_TRUE(refuses([&] { finish_chain(view); }, "r = 3; got one of rank 6"));
  view.layers[2].fit = {};
  EXPECT_TRUE(refuses([&] { finish_chain(view); }, "layer.2"));
}

}  // namespace
}  // namespace reslora
