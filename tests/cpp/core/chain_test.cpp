// The wiring of every shortcut, place in the chain and m, and what shapes forbid.
#include <gmock/gmock.h>
#include <reslora/chain.h>

#include "testing.h"

namespace reslora {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::refuses;

/// Layers with the given features and ranks; scaling 1, 2, 3, ...
struct Shape {
  int64_t in = 4;
  int64_t out = 4;
  int64_t r = 2;
};

std::vector<LayerShape> layers(const std::vector<Shape>& shapes) {
  std::vector<LayerShape> list;
  for (const Shape& shape : shapes) {
    const auto n = static_cast<double>(list.size());
    list.push_back({"l" + std::to_string(list.size()), shape.in, shape.out, shape.r, 1 + n});
  }
  return list;
}

ResLoraConfig config(const std::string& res_mode, int64_t pre_num = 1) {
  return ResLoraConfig().res_mode(res_mode).pre_num(pre_num);
}

Chain uniform(const ResLoraConfig& config, size_t size = 5) {
  return Chain(config, layers(std::vector<Shape>(size)));
}

void expect_plain(const Chain& chain, int64_t n, double scaling) {
  const Wiring& wiring = chain.wiring(n);
  EXPECT_THAT(wiring.a, ElementsAre(n));
  EXPECT_THAT(wiring.b, ElementsAre(n));
  EXPECT_THAT(wiring.scaling, ElementsAre(scaling));
  EXPECT_THAT(wiring.taps, IsEmpty());
  EXPECT_EQ(wiring.handed, Handed::kNothing);
  EXPECT_FALSE(wiring.is_doubled);
  EXPECT_FALSE(chain.is_linked(n));
  EXPECT_TRUE(chain.merges_exactly(n));
  EXPECT_THAT(chain.reached(n), IsEmpty());
}

TEST(Chain, NoneIsPlainEverywhere) {
  const Chain chain = uniform(config("none", -1));
  for (int64_t n = 0; n < chain.size(); ++n) expect_plain(chain, n, 1.0 + n);
}

TEST(Chain, PreNumZeroIsPlainForEveryShortcut) {
  for (const char* mode : {"is", "bs", "ms"}) {
    const Chain chain = uniform(config(mode, 0));
    for (int64_t n = 0; n < chain.size(); ++n) expect_plain(chain, n, 1.0 + n);
  }
}

TEST(Chain, EmptyChainIsAllowed) { EXPECT_EQ(Chain(config("is"), {}).size(), 0); }

TEST(Chain, InputShortcutHandsTheNextLayersProductOn) {
  const Chain chain = uniform(config("is"), 3);
  EXPECT_THAT(chain.wiring(0).a, ElementsAre(0, 1));
  EXPECT_THAT(chain.wiring(1).a, ElementsAre(1, 2));
  EXPECT_THAT(chain.wiring(2).a, ElementsAre(2));
  EXPECT_THAT(chain.wiring(1).b, ElementsAre(1));
  EXPECT_THAT(chain.wiring(1).scaling, ElementsAre(2));
  EXPECT_THAT(chain.wiring(0).taps, IsEmpty());
  EXPECT_THAT(chain.wiring(2).taps, ElementsAre(1));
  EXPECT_EQ(chain.wiring(1).handed, Handed::kTap);
  EXPECT_EQ(chain.wiring(2).handed, Handed::kNothing);
  EXPECT_THAT(chain.reached(2), ElementsAre(1));
  EXPECT_FALSE(chain.merges_exactly(2));
}

TEST(Chain, InputShortcutReachesOneLayerWhateverPreNumSays) {
  for (const int64_t m : {-1, 1, 3}) {
    EXPECT_THAT(uniform(config("is", m)).reached(4), ElementsAre(3));
  }
}

TEST(Chain, InputShortcutDoublesItsFirstLayerUnlessPlain) {
  const Chain doubled = uniform(config("is"));
  EXPECT_TRUE(doubled.wiring(0).is_doubled);
  EXPECT_THAT(doubled.wiring(0).scaling, ElementsAre(2));
  EXPECT_FALSE(doubled.is_linked(0));
  EXPECT_TRUE(doubled.merges_exactly(0));
  const Chain plain = uniform(config("is").first_block("plain"));
  EXPECT_FALSE(plain.wiring(0).is_doubled);
  EXPECT_THAT(plain.wiring(0).scaling, ElementsAre(1));
}

TEST(Chain, InputShortcutNeedsEqualInFeatures) {
  // Ranks and out_features may differ; in_features of layer 2 breaks two links.
  const Chain chain(config("is"), layers({{4, 4, 2}, {4, 7, 3}, {5, 4, 2}, {4, 4, 2}}));
  EXPECT_THAT(chain.wiring(1).taps, ElementsAre(0));
  EXPECT_THAT(chain.wiring(1).broken, IsEmpty());
  EXPECT_THAT(chain.wiring(2).broken,
              ElementsAre("l2 is not linked to l1: in_features 5 and 4 differ"));
  EXPECT_THAT(chain.wiring(3).broken, ElementsAre(HasSubstr("l3 is not linked to l2")));
  EXPECT_THAT(chain.wiring(3).scaling, ElementsAre(4));  // plain, not doubled
  expect_plain(chain, 2, 3);
}

TEST(Chain, BlockShortcutStacksTheWindow) {
  const Chain chain = uniform(config("bs", 2));
  EXPECT_THAT(chain.wiring(0).b, ElementsAre(0));
  EXPECT_THAT(chain.wiring(1).b, ElementsAre(0, 1));
  EXPECT_THAT(chain.wiring(4).a, ElementsAre(2, 3, 4));
  EXPECT_THAT(chain.wiring(4).b, ElementsAre(2, 3, 4));
  EXPECT_THAT(chain.wiring(4).scaling, ElementsAre(3, 4, 5));
  EXPECT_THAT(chain.wiring(4).taps, IsEmpty());
  EXPECT_EQ(chain.wiring(3).handed, Handed::kNothing);
  EXPECT_THAT(chain.reached(4), ElementsAre(3, 2));
  EXPECT_TRUE(chain.is_linked(4));
  EXPECT_TRUE(chain.merges_exactly(4));
}

TEST(Chain, BlockShortcutReachesAllAndIsClipped) {
  EXPECT_THAT(uniform(config("bs", -1)).wiring(4).b, ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(uniform(config("bs", 99)).wiring(3).b, ElementsAre(0, 1, 2, 3));
}

TEST(Chain, BlockShortcutEndsAtTheFirstOtherShape) {
  const Chain chain(config("bs", 3), layers({{4, 4}, {4, 5}, {4, 4}, {4, 4}, {4, 4, 7}}));
  EXPECT_THAT(chain.wiring(4).b, ElementsAre(2, 3, 4));  // ranks may differ
  EXPECT_THAT(chain.wiring(4).broken,
              ElementsAre("l4 is not linked to l1: 4 -> 4 and 4 -> 5 features differ"));
  EXPECT_THAT(chain.wiring(2).b, ElementsAre(2));
  const Chain narrow(config("bs", 1), layers({{4, 4}, {4, 5}, {4, 4}, {4, 4}}));
  EXPECT_THAT(narrow.wiring(3).broken, IsEmpty());  // the other shape lies outside the window
}

TEST(Chain, MiddleShortcutReadsOwnProducts) {
  const Chain chain = uniform(config("ms", 2));
  EXPECT_THAT(chain.wiring(1).taps, ElementsAre(0));
  EXPECT_THAT(chain.wiring(3).taps, ElementsAre(2, 1));
  EXPECT_THAT(chain.wiring(3).a, ElementsAre(3));
  EXPECT_EQ(chain.wiring(0).handed, Handed::kS);  // without taps s is the own product
  EXPECT_EQ(chain.wiring(1).handed, Handed::kTap);
  EXPECT_EQ(chain.wiring(3).handed, Handed::kTap);
  EXPECT_EQ(chain.wiring(4).handed, Handed::kNothing);
  EXPECT_THAT(chain.reached(3), ElementsAre(2, 1));
  EXPECT_FALSE(chain.merges_exactly(1));
}

TEST(Chain, MiddleShortcutOverAllLayersIsARunningSum) {
  const Chain chain = uniform(config("ms", -1), 4);
  for (int64_t n = 1; n < 4; ++n) {
    EXPECT_THAT(chain.wiring(n).taps, ElementsAre(n - 1));
    EXPECT_EQ(chain.wiring(n - 1).handed, Handed::kS);
  }
  EXPECT_EQ(chain.wiring(3).handed, Handed::kNothing);
  EXPECT_THAT(chain.reached(3), ElementsAre(2, 1, 0));
}

TEST(Chain, MiddleShortcutNeedsEqualRankOnly) {
  const std::vector<Shape> shapes = {{4, 4, 2}, {4, 4, 3}, {9, 5, 3}, {4, 4, 3}};
  const Chain all(config("ms", -1), layers(shapes));
  expect_plain(Chain(config("ms", 1), layers({{4, 4, 2}, {4, 4, 3}})), 1, 2);
  EXPECT_THAT(all.wiring(0).handed, Handed::kNothing);
  EXPECT_THAT(all.wiring(1).taps, IsEmpty());
  EXPECT_THAT(all.reached(3), ElementsAre(2, 1));
  EXPECT_THAT(all.wiring(3).broken, ElementsAre("l3 is not linked to l0: r 3 and 2 differ"));
  const Chain two(config("ms", 2), layers(shapes));
  EXPECT_THAT(two.wiring(2).taps, ElementsAre(1));
  EXPECT_EQ(two.wiring(1).handed, Handed::kS);
  EXPECT_THAT(two.wiring(3).taps, ElementsAre(2, 1));
}

std::vector<LayerShape> named(const std::vector<std::string>& names) {
  std::vector<LayerShape> list;
  for (const std::string& name : names) list.push_back({name, 4, 4, 2, 1});
  return list;
}

TEST(Chain, ExpertsAreLinkedByNoTap) {
  for (const char* expert : {"experts.3.w1", "mlp.experts.expert_0.wi", "local_experts.1",
                             "routed_experts.w2", "moe.expert_12.up", "moe.experts_3.up"}) {
    const std::string name = expert;
    const std::vector<LayerShape> three = named({"l0." + name, "l1." + name, "l2." + name});
    for (ResLoraConfig own : {config("is"), config("ms", 1), config("ms", 2), config("ms", -1)}) {
      const Chain chain(own.first_block("plain"), three);
      for (int64_t n = 0; n < 3; ++n) expect_plain(chain, n, 1);
      EXPECT_THAT(chain.wiring(2).broken,
                  ElementsAre("l2." + name + " is not linked to l1." + name +
                              ": experts see other tokens in each layer"));
    }
    EXPECT_THAT(Chain(config("bs", 2), three).wiring(2).b, ElementsAre(0, 1, 2));
  }
}

TEST(Chain, WhatSeesEveryTokenIsNoExpert) {
  for (const char* shared :
       {"mlp.shared_expert.up", "mlp.shared_experts.up", "action_expert.layers.q", "expert.up",
        "expertise.up", "shared_expert_0.up", "experts_gate", "0"}) {
    const std::string name = shared;
    for (const char* mode : {"is", "ms"})
      EXPECT_TRUE(Chain(config(mode), named({"l0." + name, "l1." + name})).is_linked(1)) << name;
  }
}

TEST(Chain, AnExpertEndsAWindow) {
  const Chain chain(config("ms", 2), named({"a", "b", "experts.0", "c", "d"}));
  EXPECT_THAT(chain.reached(4), ElementsAre(3));
  EXPECT_THAT(chain.wiring(4).broken, ElementsAre(HasSubstr("d is not linked to experts.0")));
}

/// Evaluates a whole chain as the wiring says, with plain ATen; layer n's input is xs[n].
std::vector<at::Tensor> evaluate(const Chain& chain, const std::vector<formulas::Block>& blocks,
                                 const std::vector<at::Tensor>& xs) {
  std::vector<at::Tensor> handed(blocks.size());
  std::vector<at::Tensor> ys;
  for (int64_t n = 0; n < chain.size(); ++n) {
    const Wiring& wiring = chain.wiring(n);
    at::Tensor own;  // what enters B
    for (const int64_t j : wiring.b) {
      const at::Tensor u = at::matmul(xs[n], blocks[j].A.t());
      own = own.defined() ? at::cat({own, u}, -1) : u;
    }
    at::Tensor s = own;
    for (const int64_t j : wiring.taps) s = s + handed[j];
    at::Tensor y = at::linear(xs[n], blocks[n].W, blocks[n].bias);
    int64_t column = 0;
    for (size_t k = 0; k < wiring.b.size(); ++k) {
      const at::Tensor& B = blocks[wiring.b[k]].B;
      y = y + wiring.scaling[k] * at::matmul(s.narrow(-1, column, B.size(1)), B.t());
      column += B.size(1);
    }
    ys.push_back(y);
    const bool has_tap_rows = wiring.a.size() > wiring.b.size();
    if (wiring.handed == Handed::kS) handed[n] = s;
    if (wiring.handed == Handed::kTap && !has_tap_rows) handed[n] = own;
    if (has_tap_rows) handed[n] = at::matmul(xs[n], blocks[wiring.a.back()].A.t());
  }
  return ys;
}

struct WiringCase {
  const char* res_mode;
  int64_t m;
};

class WiringValues : public ::testing::TestWithParam<WiringCase> {};

TEST_P(WiringValues, EqualTheLiteralFormulaInEveryLayer) {
  const auto [mode, m] = GetParam();
  const std::vector<formulas::Block> blocks = testing::random_blocks({});
  std::vector<at::Tensor> xs;
  for (size_t n = 0; n < blocks.size(); ++n) xs.push_back(testing::random({2, 3, 6}, 90 + n));
  const Chain chain(config(mode, m), testing::shapes_of(blocks));
  const std::vector<at::Tensor> ys = evaluate(chain, blocks, xs);
  for (int64_t n = 0; n < chain.size(); ++n) {
    at::Tensor expected = formulas::forward_none(blocks[n], xs[n]);
    if (chain.shortcut() == Shortcut::kIs && m != 0) {
      expected = formulas::forward_is(blocks[n], xs[n], xs[n == 0 ? 0 : n - 1]);
    }
    if (chain.shortcut() == Shortcut::kBs) expected = formulas::forward_bs(blocks, n, m, xs[n]);
    if (chain.shortcut() == Shortcut::kMs) expected = formulas::forward_ms(blocks, n, m, xs);
    EXPECT_TRUE(testing::all_close(ys[n], expected)) << mode << " m = " << m << " layer " << n;
  }
}

INSTANTIATE_TEST_SUITE_P(Chain, WiringValues,
                         ::testing::Values(WiringCase{"none", 1}, WiringCase{"is", 0},
                                           WiringCase{"is", 1}, WiringCase{"bs", 0},
                                           WiringCase{"bs", 1}, WiringCase{"bs", 3},
                                           WiringCase{"bs", 9}, WiringCase{"bs", -1},
                                           WiringCase{"ms", 0}, WiringCase{"ms", 1},
                                           WiringCase{"ms", 2}, WiringCase{"ms", 3},
                                           WiringCase{"ms", 9}, WiringCase{"ms", -1}));

TEST(Chain, ALinkThatIsLeftOutIsReadByNobody) {
  Chain chain = uniform(config("is"));
  chain.leave_out(2, {1});
  EXPECT_FALSE(chain.is_linked(2));
  EXPECT_TRUE(chain.merges_exactly(2));
  EXPECT_THAT(chain.wiring(1).a, ElementsAre(1));
  EXPECT_THAT(chain.wiring(2).broken, ElementsAre(HasSubstr("l2 is not linked to l1: they were")));
  EXPECT_THAT(chain.reached(3), ElementsAre(2));
  const Chain again(config("is"), record_of("c", chain).layers);
  EXPECT_FALSE(again.is_linked(2));
  EXPECT_TRUE(chain.layer(2) == uniform(config("is")).layer(2));
}

TEST(Chain, AWindowOfTapsGoesOnBehindALinkThatIsLeftOut) {
  Chain chain = uniform(config("ms", 3));
  chain.leave_out(4, {3});
  chain.leave_out(4, {2});
  EXPECT_THAT(chain.reached(4), ElementsAre(1));
  EXPECT_THAT(chain.layer(4).left_out, ElementsAre(2, 3));
  EXPECT_EQ(chain.wiring(3).handed, Handed::kNothing);
  Chain sums = uniform(config("ms", -1));
  sums.leave_out(4, {3});
  EXPECT_THAT(sums.reached(4), IsEmpty());
  EXPECT_THAT(sums.reached(3), ElementsAre(2, 1, 0));
  Chain blocks = uniform(config("bs", 2));
  blocks.leave_out(4, {3});
  EXPECT_THAT(blocks.reached(4), ElementsAre(3, 2));
}

TEST(Chain, StrictLinksRaiseWhereShapesForbidALink) {
  const auto strict = [](const char* mode, const std::vector<Shape>& shapes) {
    return [=] { Chain(config(mode).strict_links(true), layers(shapes)); };
  };
  EXPECT_NO_THROW(strict("ms", {{4, 5, 2}, {4, 5, 2}})());
  EXPECT_NO_THROW(strict("none", {{4, 4, 2}, {5, 4, 2}})());
  EXPECT_TRUE(refuses(strict("ms", {{4, 4, 2}, {4, 4, 3}}), "l1 is not linked to l0: r 3 and 2"));
  EXPECT_TRUE(refuses(
      [] {
        Chain(config("is").strict_links(true), named({"experts.0", "experts.1"}));
      },
      "experts.1 is not linked to experts.0: experts see other tokens"));
  EXPECT_TRUE(refuses(strict("is", {{4, 4, 2}, {4, 5, 2}}), "got 4 -> 5 (layer l1) after 4 -> 4"));
  EXPECT_TRUE(refuses(strict("ms", {{4, 4, 2}, {6, 4, 2}}), "same in_features and out_features"));
}

TEST(Chain, RefusesBadLayersAndConfigs) {
  EXPECT_TRUE(refuses([] { Chain(config("xs"), {}); }, "res_mode"));
  EXPECT_TRUE(refuses([] { Chain(config("is"), layers({{4, 4, 0}})); }, "r must be at least 1"));
  EXPECT_TRUE(refuses([] { Chain(config("is"), layers({{-1, 4, 1}})); }, "must not be negative"));
  EXPECT_TRUE(refuses([] { Chain(config("is"), {{"q", 4, 4, 1, 1.0 / 0.0}}); }, "(layer q)"));
}

}  // namespace
}  // namespace reslora
