// The op from C++: gradients without Python, refusals, and dropout's bits.
#include <gtest/gtest.h>
#include <reslora/formulas.h>
#include <reslora/ops.h>
#include <torch/autograd.h>
#include <torch/torch.h>

#include "testing.h"

namespace reslora {
namespace {

AdaptInput plain_layer(int64_t in = 6, int64_t out = 5, int64_t r = 3) {
  AdaptInput input;
  input.x = torch::randn({4, in}, torch::kDouble).requires_grad_();
  input.weight = torch::randn({out, in}, torch::kDouble);
  input.bias = torch::randn({out}, torch::kDouble);
  input.A = {torch::randn({r, in}, torch::kDouble).requires_grad_()};
  input.B = {torch::randn({out, r}, torch::kDouble).requires_grad_()};
  input.scaling = {0.5};
  return input;
}

TEST(Adapt, EqualsTheLiteralFormulaWithGradients) {
  const AdaptInput input = plain_layer();
  const formulas::Block block{*input.weight, *input.bias, input.A[0], input.B[0], 0.5};
  const at::Tensor fast = adapt(input).y;
  const at::Tensor literal = formulas::forward_none(block, input.x);
  EXPECT_TRUE(torch::allclose(fast, literal));
  const std::vector<at::Tensor> wanted = {input.x, input.A[0], input.B[0]};
  const auto have = torch::autograd::grad({fast.pow(2).sum()}, wanted);
  const auto want = torch::autograd::grad({literal.pow(2).sum()}, wanted);
  for (size_t k = 0; k < wanted.size(); ++k) EXPECT_TRUE(torch::allclose(have[k], want[k]));
}

TEST(Adapt, HandsOnTheRowsOfTheNextLayer) {
  AdaptInput input = plain_layer();
  input.A.push_back(torch::randn({2, 6}, torch::kDouble));
  const AdaptOutput output = adapt(input);
  EXPECT_TRUE(torch::allclose(output.tap, input.x.matmul(input.A[1].t())));
  EXPECT_TRUE(torch::allclose(output.s, input.x.matmul(input.A[0].t())));
}

TEST(Adapt, OutputsShareNoMemory) {
  for (const int64_t tokens : {1, 4}) {
    AdaptInput input = plain_layer();
    input.x = torch::randn({tokens, 6}, torch::kDouble);
    input.A.push_back(torch::randn({2, 6}, torch::kDouble));
    const AdaptOutput output = adapt(input);
    EXPECT_NE(output.s.storage().data(), output.tap.storage().data());
    EXPECT_EQ(output.s.storage().nbytes(), output.s.nbytes());
  }
}

TEST(Adapt, EvaluatesLayersTogetherAsApart) {
  std::vector<AdaptInput> inputs = {plain_layer(), plain_layer(6, 3, 2)};
  inputs[1].bias = std::nullopt;
  inputs[1].A.push_back(torch::randn({4, 6}, torch::kDouble).requires_grad_());
  inputs[1].x = inputs[0].x;
  for (AdaptInput& input : inputs) input.want_norms = true;
  const std::vector<AdaptOutput> together = adapt_together(inputs);
  at::Tensor loss = torch::zeros({}, torch::kDouble), other = loss.clone();
  std::vector<at::Tensor> wanted = {inputs[0].x};
  ASSERT_EQ(together.size(), 2U);
  for (size_t k = 0; k < inputs.size(); ++k) {
    const AdaptOutput apart = adapt(inputs[k]);
    EXPECT_TRUE(torch::allclose(together[k].y, apart.y));
    EXPECT_TRUE(torch::allclose(together[k].s, apart.s));
    EXPECT_TRUE(torch::allclose(together[k].tap, apart.tap));
    EXPECT_TRUE(torch::allclose(together[k].norms, apart.norms));
    loss = loss + together[k].y.pow(2).sum() + together[k].tap.sum();
    other = other + apart.y.pow(2).sum() + apart.tap.sum();
    wanted.insert(wanted.end(), inputs[k].A.begin(), inputs[k].A.end());
    wanted.push_back(inputs[k].B[0]);
  }
  const auto have = torch::autograd::grad({loss}, wanted);
  const auto want = torch::autograd::grad({other}, wanted);
  for (size_t k = 0; k < wanted.size(); ++k) EXPECT_TRUE(torch::allclose(have[k], want[k]));
}

TEST(Adapt, LayersTogetherShareOneMask) {
  std::vector<AdaptInput> inputs = {plain_layer(64), plain_layer(64)};
  inputs[1].x = inputs[0].x;
  for (AdaptInput& input : inputs) input.dropout = 0.5;
  std::vector<AdaptOutput> together = adapt_together(inputs);
  for (size_t k = 0; k < inputs.size(); ++k) {
    inputs[k].bits = together[0].bits;
    EXPECT_TRUE(torch::allclose(together[k].y, adapt(inputs[k]).y));
  }
}

TEST(Adapt, RefusesLayersTogetherThatReadOthers) {
  const std::vector<AdaptInput> inputs = {plain_layer(), plain_layer()};
  EXPECT_THROW(adapt_together(inputs), c10::ValueError);
  EXPECT_THROW(adapt_together({}), c10::ValueError);
  AdaptInput input = plain_layer();
  input.base_out = torch::zeros({4, 5}, torch::kDouble);
  EXPECT_THROW(adapt(input), c10::ValueError);
}

TEST(Adapt, RefusesADoubleBackward) {
  const AdaptInput input = plain_layer();
  const auto dx = torch::autograd::grad({adapt(input).y.pow(2).sum()}, {input.x}, {}, std::nullopt,
                                        /*create_graph=*/true)[0];
  EXPECT_THROW(dx.sum().backward(), c10::NotImplementedError);
}

TEST(Adapt, NamesBothShapesWhenTheyDisagree) {
  AdaptInput input = plain_layer();
  input.A = {torch::randn({3, 16}, torch::kDouble)};
  try {
    adapt(input);
    FAIL() << "accepted A of another width";
  } catch (const c10::Error& error) {
    const std::string what = error.what_without_backtrace();
    EXPECT_NE(what.find("x [4, 6]"), std::string::npos) << what;
    EXPECT_NE(what.find("A[0] [3, 16]"), std::string::npos) << what;
  }
}

TEST(Adapt, DrawsTheSameBitsForTheSameSeed) {
  AdaptInput input = plain_layer();
  input.dropout = 0.5;
  torch::manual_seed(5);
  const at::Tensor first = adapt(input).bits;
  torch::manual_seed(5);
  EXPECT_TRUE(torch::equal(first, adapt(input).bits));
  EXPECT_FALSE(torch::equal(first, adapt(input).bits));
}

TEST(Adapt, RunsUnderNoGradAndKeepsNothing) {
  torch::NoGradGuard no_grad;
  EXPECT_FALSE(adapt(plain_layer()).y.requires_grad());
}

}  // namespace
}  // namespace reslora
