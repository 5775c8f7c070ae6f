// A chain of layers that is calibrated and merged by regression, end to end.
#include <ATen/ATen.h>
#include <reslora/linear.h>
#include <reslora/merge.h>
#include <reslora/regression.h>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::random;

double frobenius(const Tensor& tensor) { return tensor.norm().item<double>(); }

struct Stack {
  Tensor forward(Tensor x) {
    for (ResLoraLinear& layer : layers) x = at::tanh(layer->forward(x));
    return x;
  }
  std::vector<ResLoraLinear> layers;
};

/// Correlated rows: six directions carry most of sixteen features.
Tensor inputs(int64_t count, uint64_t seed) {
  return (0.4 * at::mm(random({count, 6}, seed), random({6, 16}, 31)) +
          0.05 * random({count, 16}, seed + 1))
      .to(at::kFloat);
}

class LsqEndToEnd : public ::testing::TestWithParam<const char*> {};

TEST_P(LsqEndToEnd, MergesCloserThanTheRuleInput) {
  at::manual_seed(3);
  Stack stack;
  for (int n = 0; n < 4; ++n) stack.layers.emplace_back(16, 16);
  const LinkedChain chain = link(stack.layers, ResLoraConfig().r(4).res_mode(GetParam()));
  at::NoGradGuard no_grad;
  for (ResLoraLinear& layer : stack.layers) layer->reslora_B.normal_(0, 0.3);
  {
    const at::AutoGradMode grad(true);
    stack.forward(inputs(256, 41));  // records the norms of the rule `input`
  }
  for (ResLoraLinear& layer : stack.layers) layer->eval();
  FitCollector collector({chain.view()});
  chain.collect(&collector, 0);
  for (const uint64_t seed : {51U, 61U}) {
    stack.forward(inputs(256, seed));
    collector.end_batch();
  }
  chain.collect(nullptr);
  stack.forward(inputs(9, 71));  // is no longer collected
  ASSERT_FALSE(collector.finish_pass());
  EXPECT_EQ(collector.views()[0].layers[2].fit.rows, 512);
  const Tensor x = inputs(256, 81);
  const Tensor adapted = stack.forward(x);
  const auto error = [&](const std::vector<ChainView>& views, const char* rule) {
    MergePlan plan(views, rule);
    plan.apply();
    chain.set_enabled(false);
    const double distance = frobenius(stack.forward(x) - adapted) / frobenius(adapted);
    chain.set_enabled(true);
    plan.revert();
    return distance;
  };
  const double by_input = error({chain.view()}, "input");
  const double by_lsq = error(collector.views(), "");
  EXPECT_GT(by_input, 1e-3);
  EXPECT_LT(by_lsq, 0.5 * by_input);
  EXPECT_TRUE(at::equal(stack.forward(x), adapted));
}

INSTANTIATE_TEST_SUITE_P(Regression, LsqEndToEnd, ::testing::Values("is", "ms"));

}  // namespace
}  // namespace reslora
