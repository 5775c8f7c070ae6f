// Which call reads which tap: layers that run several times, forwards that stop, threads that die.
#include <gtest/gtest.h>
#include <reslora/formulas.h>
#include <reslora/linear.h>
#include <torch/torch.h>

#include <functional>
#include <thread>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kWidth = 6;
constexpr int64_t kDepth = 3;

struct Shortcut {
  const char* res_mode;
  int64_t pre_num;
};
void PrintTo(const Shortcut& s, std::ostream* stream) {
  *stream << s.res_mode << (s.pre_num < 0 ? "all" : std::to_string(s.pre_num));
}

/// Layers of one chain with random A and B, in fp64 so that sums in another order agree.
struct Model {
  explicit Model(const Shortcut& s = {"is", 1})
      : chain(link(layers, ResLoraConfig().r(2).res_mode(s.res_mode).pre_num(s.pre_num))) {
    torch::NoGradGuard no_grad;
    for (Tensor parameter : chain.parameters()) parameter.normal_();
  }
  Tensor operator()(Tensor x) {
    for (auto& layer : layers) x = torch::tanh(layer->forward(x));
    return x;
  }
  /// Each layer runs on every chunk before the next layer does.
  Tensor in_chunks(const Tensor& x, at::IntArrayRef sizes) {
    Tensors chunks = x.split_with_sizes(sizes);
    for (auto& layer : layers)
      for (Tensor& chunk : chunks) chunk = torch::tanh(layer->forward(chunk));
    return torch::cat(chunks);
  }
  Tensors gradients(const Tensor& y) const {
    return torch::autograd::grad({y.square().sum()}, chain.parameters());
  }
  /// What a layer gives without its taps.
  Tensor plain(int64_t n, const Tensor& x) const {
    const auto& layer = layers[n];
    return formulas::forward_none({layer->weight, layer->bias, layer->reslora_A, layer->reslora_B,
                                   chain.chain().wiring(n).scaling[0]},
                                  x);
  }
  int64_t missed() const {
    int64_t sum = 0;
    for (int64_t n = 0; n < kDepth; ++n) sum += chain.missed_links(n);
    return sum;
  }

  std::vector<ResLoraLinear> layers = [] {
    std::vector<ResLoraLinear> made;
    for (int64_t n = 0; n < kDepth; ++n) {
      made.emplace_back(kWidth, kWidth);
      made.back()->to(torch::kDouble);
    }
    return made;
  }();
  LinkedChain chain;
};

Tensor rows(int64_t count) { return torch::randn({count, kWidth}, torch::kDouble); }

class LayersThatRunSeveralTimes : public ::testing::TestWithParam<Shortcut> {};

TEST_P(LayersThatRunSeveralTimes, EqualOneRunOnAllRows) {
  Model model(GetParam());
  const Tensor x = rows(6), whole = model(x);
  const Tensors wanted = model.gradients(whole);
  for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{2, 2, 2}, {1, 4, 1}, {6}}) {
    model.chain.begin_forward();
    const Tensor y = model.in_chunks(x, sizes);
    EXPECT_TRUE(torch::allclose(y, whole));
    const Tensors found = model.gradients(y);
    for (size_t k = 0; k < wanted.size(); ++k) EXPECT_TRUE(torch::allclose(found[k], wanted[k]));
  }
  EXPECT_EQ(model.missed(), 0);
}

TEST_P(LayersThatRunSeveralTimes, RunPlainAndAreCountedWithoutBeginForward) {
  Model model(GetParam());
  const Tensor x = rows(6), whole = model(x);
  testing::Warnings warnings;
  Tensor expected = x;
  for (int64_t n = 0; n < kDepth; ++n) expected = torch::tanh(model.plain(n, expected));
  EXPECT_TRUE(torch::allclose(model.in_chunks(x, {3, 3}), expected));
  EXPECT_GT(model.chain.missed_links(1), 1) << "every call is counted";
  ASSERT_EQ(warnings.all.size(), 1U);
  EXPECT_NE(warnings.all[0].find("call begin_forward before each forward"), std::string::npos);
  EXPECT_TRUE(torch::equal(model(x), whole)) << "the pass has ended with the last call";
}

TEST_P(LayersThatRunSeveralTimes, ReadFreshTapsInLoopsOverTime) {
  Model model(GetParam());
  const Tensor x1 = rows(4), x2 = rows(4), y1 = model(x1), y2 = model(x2);
  model.chain.begin_forward();  // its pass ends after the first step; the second begins its own
  EXPECT_TRUE(torch::equal(model(x1), y1));
  EXPECT_TRUE(torch::equal(model(x2), y2));
  EXPECT_EQ(model.missed(), 0);
}

TEST_P(LayersThatRunSeveralTimes, AreEvaluatedTogetherInPairs) {
  Model q(GetParam()), k(GetParam());
  const Tensor x = rows(6);
  const auto run = [&](const std::vector<int64_t>& sizes) {
    q.chain.begin_forward();
    k.chain.begin_forward();
    Tensors chunks = x.split_with_sizes(sizes);
    for (int64_t n = 0; n < kDepth; ++n)
      for (Tensor& chunk : chunks) {
        const Tensors y = forward_together({q.layers[n].ptr(), k.layers[n].ptr()}, chunk);
        chunk = torch::tanh(y[0] - y[1]);
      }
    return torch::cat(chunks);
  };
  EXPECT_TRUE(torch::allclose(run({3, 3}), run({6})));
  EXPECT_EQ(q.missed() + k.missed(), 0);
}

INSTANTIATE_TEST_SUITE_P(All, LayersThatRunSeveralTimes,
                         ::testing::Values(Shortcut{"is", 1}, Shortcut{"ms", 1}, Shortcut{"ms", 2},
                                           Shortcut{"ms", -1}),
                         ::testing::PrintToStringParamName());

TEST(Passes, ACallThatTheLayerBeforeDidNotHaveRunsPlainAndIsCounted) {
  Model model;
  const Tensor x = rows(4);
  model.chain.begin_forward();
  model.layers[0]->forward(x);
  EXPECT_FALSE(torch::allclose(model.layers[1]->forward(x), model.plain(1, x)));
  EXPECT_TRUE(torch::allclose(model.layers[1]->forward(x), model.plain(1, x)));
  EXPECT_EQ(model.chain.missed_links(1), 1);
}

TEST(Passes, AForwardThatTheFirstLayerRefusedLeavesNothingBehind) {
  Model model;
  const Tensor x = rows(4), whole = model(x);
  EXPECT_THROW(model(torch::randn({4, kWidth + 1}, torch::kDouble)), c10::Error);
  EXPECT_TRUE(torch::equal(model(x), whole));
  EXPECT_EQ(model.missed(), 0);
}

TEST(Passes, AForwardThatEndedAfterTheFirstLayerIsTakenForAChunkOnce) {
  Model model;
  const Tensor x = rows(4), whole = model(x);
  model.layers[0]->forward(x);
  model.chain.begin_forward();
  EXPECT_TRUE(torch::equal(model(x), whole));
  EXPECT_EQ(model.missed(), 0);
  model.layers[0]->forward(x);
  Tensor plain = x;
  for (int64_t n = 0; n < kDepth; ++n) plain = torch::tanh(model.plain(n, plain));
  EXPECT_TRUE(torch::allclose(model(x), plain));
  EXPECT_EQ(model.missed(), kDepth - 1);
  EXPECT_TRUE(torch::equal(model(x), whole));
}

TEST(Passes, AForwardWithinAForwardEndsTheOuterOne) {
  Model model;
  const Tensor x = rows(4), whole = model(x);
  Tensor h = torch::tanh(model.layers[0]->forward(x));
  h = torch::tanh(model.layers[1]->forward(h));
  EXPECT_TRUE(torch::equal(model(x), whole));
  EXPECT_TRUE(torch::allclose(model.layers[2]->forward(h), model.plain(2, h)));
  EXPECT_EQ(model.chain.missed_links(2), 1);
  EXPECT_TRUE(torch::equal(model(x), whole));
}

/// x of memory that tells when it is freed: a graph that saved x holds it.
Tensor noted(std::vector<double>& memory, bool& is_freed) {
  memory.assign(4 * kWidth, 0.5);
  return torch::from_blob(
      memory.data(), {4, kWidth}, [&](void*) { is_freed = true; }, torch::kDouble);
}

TEST(Passes, FreeTheirTapsWhenTheyEnd) {
  Model model;
  std::vector<double> memory;
  for (const bool is_asked_for : {false, true}) {
    bool is_freed = false;
    if (is_asked_for) model.chain.begin_forward();
    Tensor y = model(noted(memory, is_freed));
    EXPECT_FALSE(is_freed) << "the graph of y holds x";
    y = Tensor();
    EXPECT_TRUE(is_freed);
  }
}

TEST(Passes, OfThreadsThatDiedAreNeitherReadNorKept) {
  Model model;
  const Tensor x = rows(4), whole = model(x);
  std::vector<double> memory;
  for (const bool is_asked_for : {false, true}) {
    bool is_freed = false;
    std::thread([&] {
      if (is_asked_for) model.chain.begin_forward();
      model.layers[0]->forward(noted(memory, is_freed));
    }).join();
    Tensor y;
    std::thread([&] { y = model.layers[1]->forward(x); }).join();  // often of the same id
    EXPECT_TRUE(torch::allclose(y, model.plain(1, x)));
    EXPECT_FALSE(is_freed);
    EXPECT_TRUE(torch::equal(model(x), whole));
    EXPECT_TRUE(is_freed) << "a pass that begins drops those of threads that are gone";
  }
  EXPECT_EQ(model.chain.missed_links(1), 2);
}

}  // namespace
}  // namespace reslora
