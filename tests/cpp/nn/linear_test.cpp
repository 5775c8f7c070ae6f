// ResLoraLinear in LibTorch programs: drop-in, passes, explicit taps, training, merging, copies.
#include <gtest/gtest.h>
#include <reslora/formulas.h>
#include <reslora/linear.h>
#include <reslora/merge.h>
#include <torch/torch.h>

#include <sstream>
#include <thread>

#include "testing.h"

namespace reslora {
namespace {

constexpr int64_t kWidth = 6;

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  explicit NetImpl(int64_t layers = 4) : layer_count(layers) { reset(); }
  void reset() override {
    blocks.clear();
    for (int64_t n = 0; n < layer_count; ++n)
      blocks.push_back(register_module("block" + std::to_string(n), ResLoraLinear(kWidth, kWidth)));
  }
  at::Tensor forward(at::Tensor x, int64_t first = 0, int64_t last = -1) {
    if (last < 0) last = layer_count;
    for (int64_t n = first; n < last; ++n) x = torch::tanh(blocks[n]->forward(x));
    return x;
  }
  int64_t layer_count;
  std::vector<ResLoraLinear> blocks;
};
TORCH_MODULE(Net);

struct Case {
  const char* res_mode;
  int64_t pre_num;
};
void PrintTo(const Case& c, std::ostream* stream) {
  *stream << c.res_mode << (c.pre_num < 0 ? "all" : std::to_string(c.pre_num));
}

ResLoraConfig config_of(const Case& c) {
  return ResLoraConfig().r(2).lora_alpha(3).res_mode(c.res_mode).pre_num(c.pre_num);
}

void randomise(const LinkedChain& chain) {
  torch::NoGradGuard no_grad;
  for (at::Tensor parameter : chain.parameters()) parameter.normal_();
}

std::vector<formulas::Block> blocks_of(const Net& net, const LinkedChain& chain) {
  std::vector<formulas::Block> blocks;
  for (int64_t n = 0; n < net->layer_count; ++n) {
    const auto& layer = net->blocks[n];
    blocks.push_back({layer->weight, layer->bias, layer->reslora_A, layer->reslora_B,
                      chain.chain().layer(n).scaling});
  }
  return blocks;
}

at::Tensor literal(const Case& c, const std::vector<formulas::Block>& blocks,
                   const at::Tensor& x0) {
  const std::string mode = c.res_mode;
  std::vector<at::Tensor> xs = {x0};
  for (int64_t n = 0; n < static_cast<int64_t>(blocks.size()); ++n) {
    at::Tensor y;
    if (mode == "none") y = formulas::forward_none(blocks[n], xs[n]);
    if (mode == "is") y = formulas::forward_is(blocks[n], xs[n], n ? xs[n - 1] : xs[n]);
    if (mode == "bs") y = formulas::forward_bs(blocks, n, c.pre_num, xs[n]);
    if (mode == "ms") y = formulas::forward_ms(blocks, n, c.pre_num, xs);
    xs.push_back(torch::tanh(y));
  }
  return xs.back();
}

TEST(ResLoraLinear, IsATorchLinearUntilLinked) {
  torch::manual_seed(0);
  torch::nn::Linear plain(torch::nn::LinearOptions(3, 5).bias(false));
  ResLoraLinear ours(torch::nn::LinearOptions(3, 5).bias(false));
  ASSERT_EQ(plain->named_parameters().keys(), ours->named_parameters().keys());
  {
    torch::NoGradGuard no_grad;
    ours->weight.copy_(plain->weight);
  }
  const at::Tensor x = torch::randn({2, 7, 3});
  EXPECT_TRUE(torch::equal(plain->forward(x), ours->forward(x)));
  EXPECT_TRUE(ours->weight.requires_grad());
  torch::nn::Sequential sequence(ResLoraLinear(3, 4), torch::nn::Tanh(), ResLoraLinear(4, 2));
  EXPECT_EQ(sequence->forward(x).sizes(), (std::vector<int64_t>{2, 7, 2}));
}

class Shortcuts : public ::testing::TestWithParam<Case> {};

TEST_P(Shortcuts, PassesEqualTheLiteralFormulas) {
  Net net;
  net->to(torch::kDouble);
  const LinkedChain chain = link(net->blocks, config_of(GetParam()));
  const at::Tensor x = torch::randn({5, kWidth}, torch::kDouble);
  const at::Tensor base = [&] {
    chain.set_enabled(false);
    at::Tensor y = net->forward(x);
    chain.set_enabled(true);
    return y;
  }();
  EXPECT_TRUE(torch::allclose(net->forward(x), base)) << "B starts at zero";
  randomise(chain);
  EXPECT_TRUE(torch::allclose(net->forward(x), literal(GetParam(), blocks_of(net, chain), x)));
}

TEST_P(Shortcuts, ExplicitTapsEqualPasses) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of(GetParam()));
  randomise(chain);
  const at::Tensor x = torch::randn({5, kWidth});
  at::Tensor h = x;
  Taps taps;
  for (auto& block : net->blocks) {
    std::tie(h, taps) = block->forward_with_taps(h, std::move(taps));
    h = torch::tanh(h);
  }
  EXPECT_TRUE(torch::equal(h, net->forward(x)));
}

TEST_P(Shortcuts, AFourLayerChainTrainsAndMerges) {
  torch::manual_seed(1);
  Net net;
  const LinkedChain chain = link(net->blocks, config_of(GetParam()));
  const at::Tensor x = torch::randn({64, kWidth});
  const at::Tensor target = torch::tanh(x.matmul(torch::randn({kWidth, kWidth})));
  torch::optim::Adam optimizer(chain.parameters(), torch::optim::AdamOptions(2e-2));
  const at::Tensor frozen = net->blocks[0]->weight.clone();
  const auto loss_now = [&] { return torch::mse_loss(net->forward(x), target); };
  const double before = loss_now().item<double>();
  for (int step = 0; step < 150; ++step) {
    optimizer.zero_grad();
    loss_now().backward();
    optimizer.step();
  }
  net->eval();
  torch::NoGradGuard no_grad;
  const at::Tensor trained = net->forward(x);
  EXPECT_LT(torch::mse_loss(trained, target).item<double>(), 0.8 * before);
  EXPECT_TRUE(torch::equal(frozen, net->blocks[0]->weight));
  EXPECT_EQ(net->blocks[1]->norms.filled(), 100);

  MergePlan plan({chain.view()}, "");
  plan.apply();
  chain.set_enabled(false);
  const at::Tensor merged = net->forward(x);
  const double error = ((merged - trained).norm() / trained.norm()).item<double>();
  const std::string mode = GetParam().res_mode;
  const bool is_exact = mode == "none" || mode == "bs";
  // How far off is and ms are depends on the net; that they are not exact is the paper's point.
  EXPECT_EQ(error < 1e-5, is_exact) << error;
  const LayerMerge& first = plan.layers()[0];
  EXPECT_TRUE(torch::allclose(net->blocks[0]->weight, frozen + first.B.matmul(first.A)));
  EXPECT_EQ(plan.layers()[3].rule, is_exact ? MergeRule::kExact : MergeRule::kProjected);
  plan.revert();
  chain.set_enabled(true);
  EXPECT_TRUE(torch::equal(frozen, net->blocks[0]->weight));
  EXPECT_TRUE(torch::equal(trained, net->forward(x)));
}

TEST_P(Shortcuts, CopiesAreRelinkedAmongThemselves) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of(GetParam()));
  randomise(chain);
  const at::Tensor x = torch::randn({5, kWidth});
  auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  EXPECT_THROW(copy->forward(x), c10::Error);
  const auto chains = relink(*copy);
  ASSERT_EQ(chains.size(), 1U);
  EXPECT_TRUE(torch::equal(copy->forward(x), net->forward(x)));
  randomise(chain);  // the original's parameters are its own
  EXPECT_FALSE(torch::equal(copy->forward(x), net->forward(x)));
  EXPECT_THROW(relink(*net), c10::ValueError);
  EXPECT_EQ(chain.view().layers.size(), 4U) << "the original's chain is as it was";
}

TEST(Relink, TakesACopyOfALayerItself) {
  ResLoraLinear layer(kWidth, kWidth);
  const LinkedChain chain = link({layer}, config_of({"is", 1}));
  randomise(chain);
  const auto copy = std::dynamic_pointer_cast<ResLoraLinearImpl>(layer->clone());
  EXPECT_EQ(relink(*copy).size(), 1U);
  const at::Tensor x = torch::randn({5, kWidth});
  EXPECT_TRUE(torch::equal(copy->forward(x), layer->forward(x)));
}

TEST_P(Shortcuts, SerializesByParameterName) {
  Net net, other;
  const LinkedChain chain = link(net->blocks, config_of(GetParam()));
  link(other->blocks, config_of(GetParam()));
  randomise(chain);
  std::stringstream stream;
  torch::save(net, stream);
  torch::load(other, stream);
  const at::Tensor x = torch::randn({5, kWidth});
  EXPECT_TRUE(torch::equal(other->forward(x), net->forward(x)));
}

TEST_P(Shortcuts, LayersTogetherEqualLayersApart) {
  const Case c = GetParam();
  Net q(3), k(3);
  const LinkedChain chains[] = {link(q->blocks, config_of(c)), link(k->blocks, config_of(c))};
  for (const LinkedChain& chain : chains) randomise(chain);
  std::vector<at::Tensor> parameters = chains[0].parameters();
  for (const at::Tensor& parameter : chains[1].parameters()) parameters.push_back(parameter);
  const at::Tensor start = torch::randn({4, kWidth});
  std::vector<std::vector<at::Tensor>> results;
  for (const bool is_together : {true, false}) {
    at::Tensor x = start;
    for (int64_t n = 0; n < 3; ++n) {
      const auto y =
          is_together ? forward_together({q->blocks[n].ptr(), k->blocks[n].ptr()}, x)
                      : std::vector<at::Tensor>{q->blocks[n]->forward(x), k->blocks[n]->forward(x)};
      x = torch::tanh(y[0] - y[1]);
    }
    results.push_back(torch::autograd::grad({x.pow(2).sum()}, parameters));
    results.back().push_back(x);
  }
  for (size_t j = 0; j < results[0].size(); ++j)
    EXPECT_TRUE(torch::allclose(results[0][j], results[1][j], 1e-4, 1e-5));
  EXPECT_EQ(chains[0].missed_links(2), 0);
  const auto norms = q->blocks[1]->norms.norms();
  EXPECT_TRUE(torch::allclose(norms.select(1, 0), norms.select(1, 1)));
}

INSTANTIATE_TEST_SUITE_P(All, Shortcuts,
                         ::testing::Values(Case{"none", 0}, Case{"is", 1}, Case{"bs", 1},
                                           Case{"bs", -1}, Case{"ms", 1}, Case{"ms", 2},
                                           Case{"ms", -1}),
                         ::testing::PrintToStringParamName());

TEST(Passes, AForwardThatStoppedEarlyLeavesNothingBehind) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of({"is", 1}));
  randomise(chain);
  const at::Tensor x = torch::randn({5, kWidth});
  const at::Tensor whole = net->forward(x);
  net->forward(torch::randn({5, kWidth}), 0, 2);
  EXPECT_TRUE(torch::equal(net->forward(x), whole));
}

TEST(Passes, EnteringMidChainRunsPlainAndIsCounted) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of({"is", 1}));
  randomise(chain);
  const at::Tensor x = torch::randn({5, kWidth});
  net->forward(x);
  EXPECT_EQ(chain.missed_links(2), 0);
  reslora::testing::Warnings warnings;
  const at::Tensor entered = net->blocks[2]->forward(x);
  net->blocks[3]->forward(x.view({1, 5, kWidth}));
  EXPECT_EQ(warnings.all.size(), 1U) << "one for each chain";
  EXPECT_NE(warnings.all.at(0).find("2 ran without its shortcut"), std::string::npos);
  const formulas::Block block = blocks_of(net, chain)[2];
  EXPECT_TRUE(torch::allclose(entered, formulas::forward_none(block, x), 1e-4, 1e-5));
  EXPECT_EQ(chain.missed_links(2), 1);
}

TEST(Passes, BeginForwardDropsWhatAnExceptionLeft) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of({"ms", -1}));
  randomise(chain);
  const at::Tensor x = torch::randn({5, kWidth});
  chain.begin_forward();
  const at::Tensor clean = net->forward(x);
  EXPECT_THROW(net->forward(torch::randn({5, kWidth + 1})), c10::Error);
  chain.begin_forward();
  EXPECT_TRUE(torch::equal(net->forward(x), clean));
}

TEST(Passes, ThreadsDoNotShareThem) {
  Net net;
  const LinkedChain chain = link(net->blocks, config_of({"is", 1}));
  randomise(chain);
  net->eval();
  const at::Tensor x1 = torch::randn({5, kWidth}), x2 = torch::randn({5, kWidth});
  const at::Tensor y1 = net->forward(x1), y2 = net->forward(x2);
  bool is_equal1 = true, is_equal2 = true;
  const auto run = [&](const at::Tensor& x, const at::Tensor& y, bool& is_equal) {
    for (int k = 0; k < 200; ++k) is_equal = is_equal && torch::equal(net->forward(x), y);
  };
  std::thread other(run, x1, y1, std::ref(is_equal1));
  run(x2, y2, is_equal2);
  other.join();
  EXPECT_TRUE(is_equal1 && is_equal2);
}

TEST(Passes, LayersTogetherMayBePlainAndAreOfDifferentChains) {
  Net net(2);
  const at::Tensor x = torch::randn({3, kWidth});
  const std::vector<std::shared_ptr<ResLoraLinearImpl>> layers = {net->blocks[0].ptr(),
                                                                  net->blocks[1].ptr()};
  EXPECT_TRUE(torch::equal(forward_together(layers, x)[1], net->blocks[1]->forward(x)));
  const LinkedChain chain = link(net->blocks, config_of({"is", 1}));
  EXPECT_THROW(forward_together(layers, x), c10::ValueError);
  EXPECT_TRUE(forward_together({}, x).empty());
  EXPECT_THROW(net->blocks[0]->forward_with_taps(x, {std::vector<at::Tensor>(3)}), c10::ValueError);
  EXPECT_EQ(chain.missed_links(1), 0);
}

TEST(Link, RefusesALayerTwiceAndChangesNothing) {
  Net net;
  ResLoraLinear same = net->blocks[0];
  EXPECT_THROW(link({net->blocks[0], same}, config_of({"is", 1})), c10::ValueError);
  EXPECT_THROW(link(net->blocks, config_of({"is", 1}).r(0)), c10::ValueError);
  EXPECT_FALSE(net->blocks[0]->is_adapted());
  link(net->blocks, config_of({"is", 1}));
  EXPECT_THROW(link(net->blocks, config_of({"is", 1})), c10::ValueError);
}

TEST(ResLoraLinear, PrintsWhatItIs) {
  Net net;
  std::stringstream plain, adapted;
  plain << *net->blocks[1];
  link(net->blocks, config_of({"is", 1}));
  adapted << *net->blocks[1];
  EXPECT_EQ(plain.str(), "reslora::ResLoraLinear(in_features=6, out_features=6, bias=true)");
  EXPECT_EQ(adapted.str(),
            "reslora::ResLoraLinear(in_features=6, out_features=6, bias=true, r=2, res_mode=is, "
            "position=1)");
}

TEST(ForwardTogether, RefusesTwoLayersOfAChainBesideAPlainOne) {
  const std::vector<ResLoraLinear> layers = {ResLoraLinear(4, 4), ResLoraLinear(4, 4)};
  ResLoraLinear plain(4, 4);
  const LinkedChain chain = link(layers, ResLoraConfig().r(2).res_mode("is"), {"a", "b"});
  const at::Tensor x = torch::randn({3, 4});
  EXPECT_TRUE(testing::refuses(
      [&] {
        forward_together({layers[0].ptr(), layers[1].ptr(), plain.ptr()}, x);
      },
      "must be of different chains; got a and b of one"));
  const std::vector<at::Tensor> y =
      forward_together({plain.ptr(), layers[0].ptr(), plain.ptr()}, x);
  EXPECT_TRUE(torch::equal(y[0], plain->forward(x)) && torch::equal(y[0], y[2]));
}

}  // namespace
}  // namespace reslora
