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
