// The rule `projected`: sums of products, and what is solved from them.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <reslora/merge.h>
#include <reslora/norm_window.h>
#include <reslora/ops.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

constexpr int64_t kRank = 3, kIn = 6, kOut = 5;

at::Tensor gram_of(const at::Tensor& s, const at::Tensor& u) {
  const at::Tensor rows = at::cat({s, u}, 1);
  return at::mm(rows.t(), rows);
}

/// A chain of two linked layers, of which the second has these sums.
ChainView view_of(const at::Tensor& products, const std::string& res_mode = "is") {
  const auto config = ResLoraConfig().r(kRank).lora_alpha(2 * kRank).res_mode(res_mode);
  std::vector<LayerShape> shapes;
  for (const char* name : {"l.0.q", "l.1.q"}) shapes.push_back({name, kIn, kOut, kRank, 2});
  ChainView view{Chain(config, shapes), {}};
  for (int64_t n = 0; n < 2; ++n) {
    const NormWindow window(at::ones({2, 3}), at::full({1}, 3, at::kLong),
                            n == 1 ? products : at::Tensor());
    view.layers.push_back({at::zeros({kOut, kIn}), random({kRank, kIn}, 10 + n).to(at::kFloat),
                           random({kOut, kRank}, 20 + n).to(at::kFloat), window});
  }
  return view;
}

TEST(RecordProducts, AddsToDecayingSums) {
  const at::Tensor s = random({2, 4, kRank}, 1).to(at::kFloat);
  const at::Tensor first = random({2, 4, kRank}, 2).to(at::kFloat);
  const at::Tensor second = random({2, 4, kRank}, 3);  // fp64: what is summed is fp32
  const at::Tensor sums = at::zeros({2 * kRank, 2 * kRank});
  record_products(s, {first, second}, sums, 0.5);
  const at::Tensor u = (s - first - second.to(at::kFloat)).view({-1, kRank});
  const at::Tensor wanted = gram_of(s.view({-1, kRank}), u);
  EXPECT_TRUE(at::allclose(sums, wanted, 1e-5, 1e-5));
  record_products(s.to(at::kBFloat16), {}, sums, 0.5);
  const at::Tensor again = s.to(at::kBFloat16).to(at::kFloat).view({-1, kRank});
  EXPECT_TRUE(at::allclose(sums, wanted * 0.5 + gram_of(again, again), 1e-5, 1e-5));
}

/// M by its formula, from the rows.
at::Tensor solved(const at::Tensor& s, const at::Tensor& u) {
  const double su = (s * u).sum().item<double>();
  const double s_norm = s.norm().item<double>(), u_norm = u.norm().item<double>();
  const double c = s_norm / (u_norm * std::max(su / (s_norm * u_norm), 0.5));
  const at::Tensor uu = at::mm(u.t(), u), identity = at::eye(kRank, at::kDouble);
  const at::Tensor pulled = uu + identity * (0.3 * uu.trace().item<double>() / kRank);
  return identity * c + at::mm(at::mm(s.t(), u) - uu * c, pulled.inverse());
}

TEST(Projection, IsTheFormulaOfTheRows) {
  const at::Tensor M = at::eye(kRank, at::kDouble) + random({kRank, kRank}, 4);
  const at::Tensor u = random({2000, kRank}, 5);
  for (const at::Tensor& s : {at::mm(u, M.t()), at::mm(u, M.t()) + random({2000, kRank}, 6), -u}) {
    ChainView view = view_of(gram_of(s, u).to(at::kFloat));
    view.layers[1].A = at::eye(kRank, kIn);
    const MergePlan plan({view}, "");
    EXPECT_EQ(plan.layers()[0].rule, MergeRule::kExact);
    const LayerMerge& merged = plan.layers()[1];
    EXPECT_EQ(merged.rule, MergeRule::kProjected);
    const at::Tensor found = merged.A.narrow(1, 0, kRank).to(at::kDouble);
    EXPECT_TRUE(at::allclose(found, solved(s, u), 1e-4, 1e-4));
    const at::Tensor error = s - at::mm(u, found.t());
    EXPECT_NEAR(*merged.residual, (error.norm() / s.norm()).item<double>(), 1e-3);
    EXPECT_TRUE(at::allclose(merged.B, view.layers[1].B * 2));
  }
}

TEST(Projection, IsChosenWhereEverySumIsThere) {
  const at::Tensor sums = gram_of(random({9, kRank}, 7), random({9, kRank}, 8)).to(at::kFloat);
  const auto rule_with = [](const at::Tensor& products) {
    return MergePlan({view_of(products)}, "").layers()[1].rule;
  };
  EXPECT_EQ(rule_with(sums), MergeRule::kProjected);
  EXPECT_EQ(rule_with(at::zeros_like(sums)), MergeRule::kInput);  // nothing was added to them
  EXPECT_EQ(rule_with(at::Tensor()), MergeRule::kInput);
}

TEST(Projection, OfNothingIsTheLayerItself) {
  const at::Tensor some = random({9, kRank}, 7), none = at::zeros({9, kRank}, at::kDouble);
  for (const auto& [s, u, residual] : {std::tuple(some, none, 1.0), std::tuple(none, some, 0.0)}) {
    const ChainView view = view_of(gram_of(s, u).to(at::kFloat));
    const LayerMerge merged = MergePlan({view}, "projected").layers()[1];
    EXPECT_TRUE(at::equal(merged.A, view.layers[1].A));
    EXPECT_EQ(*merged.residual, residual);
  }
}

TEST(Projection, RefusesWhatIsNoSum) {
  const auto plan = [](const at::Tensor& products) { MergePlan({view_of(products)}, "projected"); };
  EXPECT_TRUE(refuses([&] { plan(at::Tensor()); }, "needs the sums that training forwards leave"));
  EXPECT_TRUE(refuses([&] { plan(at::ones({4, 4})); }, "of the layer's rank, [6, 6]; got"));
  EXPECT_TRUE(refuses([&] { plan(at::full({6, 6}, NAN)); }, "finite sums of products"));
}

}  // namespace
}  // namespace reslora
