// The literal formulas: hand-computed cases, and what merging must leave unchanged.
#include <reslora/formulas.h>

#include "testing.h"

namespace reslora {
namespace {

using formulas::Block;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

at::Tensor matrix(std::vector<double> values, int64_t rows) {
  return at::tensor(values, at::kDouble).view({rows, -1});
}

/// Two layers of 2 x 2 with r = 1 and scaling 2 and 3, small enough to work out on paper.
std::vector<Block> paper_blocks() {
  return {{matrix({1, 0, 0, 1}, 2), {}, matrix({1, 2}, 1), matrix({1, -1}, 2), 2},
          {matrix({0, 1, 1, 0}, 2), at::tensor({10.0, 20.0}, at::kDouble), matrix({3, -1}, 1),
           matrix({2, 1}, 2), 3}};
}

const at::Tensor& x0() {
  static const at::Tensor x = matrix({1, 1}, 1);  // A_0 x_0 = 3, A_1 x_0 = 2
  return x;
}

const at::Tensor& x1() {
  static const at::Tensor x = matrix({2, 5}, 1);  // A_0 x_1 = 12, A_1 x_1 = 1, W_1 x_1 = (5, 2)
  return x;
}

TEST(Formulas, ForwardByHand) {
  const std::vector<Block> blocks = paper_blocks();
  // none: (5, 2) + bias + 3 * 1 * (2, 1)
  EXPECT_TRUE(all_close(formulas::forward_none(blocks[1], x1()), matrix({21, 25}, 1)));
  // is: A_1 (x_1 + x_0) = 3
  EXPECT_TRUE(all_close(formulas::forward_is(blocks[1], x1(), x0()), matrix({33, 31}, 1)));
  // bs: none + 2 * 12 * (1, -1)
  EXPECT_TRUE(all_close(formulas::forward_bs(blocks, 1, 1, x1()), matrix({45, 1}, 1)));
  // ms: A_1 x_1 + A_0 x_0 = 4
  EXPECT_TRUE(all_close(formulas::forward_ms(blocks, 1, 1, {x0(), x1()}), matrix({39, 34}, 1)));
}

TEST(Formulas, FirstLayerByHand) {
  const Block first = paper_blocks()[0];
  // x_0 + 2 * 3 * (1, -1), and twice the second term for a doubled first block
  EXPECT_TRUE(all_close(formulas::forward_is(first, x0(), {}), matrix({7, -5}, 1)));
  EXPECT_TRUE(all_close(formulas::forward_is(first, x0(), x0()), matrix({13, -11}, 1)));
  EXPECT_TRUE(all_close(formulas::forward_bs({first}, 0, -1, x0()), matrix({7, -5}, 1)));
  EXPECT_TRUE(all_close(formulas::forward_ms({first}, 0, 4, {x0()}), matrix({7, -5}, 1)));
}

TEST(Formulas, MergedWeightsByHand) {
  const std::vector<Block> blocks = paper_blocks();
  // B_1 A_1 = (6, -2; 3, -1), B_0 A_0 = (1, 2; -1, -2)
  EXPECT_TRUE(all_close(formulas::merged_none(blocks[1]), matrix({18, -5, 10, -3}, 2)));
  EXPECT_TRUE(all_close(formulas::merged_is(blocks[1], 0.5), matrix({27, -8, 14.5, -4.5}, 2)));
  EXPECT_TRUE(all_close(formulas::merged_bs(blocks, 1, 1), matrix({20, -1, 8, -7}, 2)));
  EXPECT_TRUE(all_close(formulas::merged_ms_input(blocks[1], {0.25, 0.25}),
                        matrix({27, -8, 14.5, -4.5}, 2)));
  // A_1 + 0.5 A_0 = (3.5, 0)
  EXPECT_TRUE(all_close(formulas::merged_ms_weight(blocks, 1, {0.5}), matrix({21, 1, 11.5, 0}, 2)));
}

TEST(Formulas, WindowIsClippedAndMinusOneMeansAll) {
  const std::vector<Block> blocks = random_blocks({});
  std::vector<at::Tensor> xs;
  for (uint64_t n = 0; n < 5; ++n) xs.push_back(random({3, 6}, n));
  for (int64_t n = 0; n < 5; ++n) {
    EXPECT_TRUE(all_close(formulas::forward_bs(blocks, n, -1, xs[n]),
                          formulas::forward_bs(blocks, n, 9, xs[n])));
    EXPECT_TRUE(
        all_close(formulas::forward_ms(blocks, n, -1, xs), formulas::forward_ms(blocks, n, n, xs)));
    EXPECT_TRUE(all_close(formulas::forward_bs(blocks, n, 0, xs[n]),
                          formulas::forward_none(blocks[n], xs[n])));
  }
}

TEST(Formulas, BlockShortcutMergesExactlyForEveryPlaceAndWindow) {
  const std::vector<Block> blocks = random_blocks({5, 7, 4, 2, true});
  const at::Tensor x = random({3, 7}, 1);
  for (int64_t n = 0; n < 5; ++n) {
    for (const int64_t m : {-1, 0, 1, 2, 9}) {
      const at::Tensor merged = formulas::merged_bs(blocks, n, m);
      EXPECT_TRUE(
          all_close(at::linear(x, merged, blocks[n].bias), formulas::forward_bs(blocks, n, m, x)));
    }
  }
}

TEST(Formulas, MergingIsExactWhereTheNeighbourIsAMultipleOfTheInput) {
  const std::vector<Block> blocks = random_blocks({});
  const at::Tensor x = random({3, 6}, 2);
  const at::Tensor by_is = at::linear(x, formulas::merged_is(blocks[3], 0.7), blocks[3].bias);
  EXPECT_TRUE(all_close(by_is, formulas::forward_is(blocks[3], x, 0.7 * x)));
  const std::vector<at::Tensor> xs = {x, x, 0.2 * x, 0.7 * x, x};
  const at::Tensor merged = formulas::merged_ms_weight(blocks, 4, {0.7, 0.2});
  EXPECT_TRUE(
      all_close(at::linear(x, merged, blocks[4].bias), formulas::forward_ms(blocks, 4, 2, xs)));
}

TEST(Formulas, AcceptAnyLeadingDimensionsAndDtype) {
  const Block block = random_blocks({})[0];
  for (const std::vector<int64_t>& sizes :
       std::vector<std::vector<int64_t>>{{6}, {0, 6}, {2, 1, 3, 6}}) {
    const at::Tensor x = random(sizes, 3);
    const at::Tensor y = formulas::forward_none(block, x);
    EXPECT_TRUE(all_close(y.reshape({-1, 6}), formulas::forward_none(block, x.reshape({-1, 6}))));
  }
  const Block half = {
      block.W.to(at::kBFloat16), {}, block.A.to(at::kBFloat16), block.B.to(at::kBFloat16), 1};
  const at::Tensor x = random({2, 6}, 3).to(at::kBFloat16);
  EXPECT_EQ(formulas::forward_is(half, x, x).scalar_type(), at::kBFloat16);
}

TEST(Formulas, AreDifferentiable) {
  std::vector<Block> blocks = random_blocks({});
  std::vector<at::Tensor> xs;
  for (uint64_t n = 0; n < 3; ++n) xs.push_back(random({2, 6}, n).requires_grad_(true));
  for (Block& block : blocks) block.A.requires_grad_(true);
  formulas::forward_ms(blocks, 2, 1, xs).sum().backward();
  EXPECT_FALSE(xs[0].grad().defined());  // outside the window
  // d sum(y) / d x_1 = s_2 A_1^T B_2^T 1 for every row
  const at::Tensor row = blocks[2].scaling * at::matmul(blocks[1].A.t(), blocks[2].B.sum(0));
  EXPECT_TRUE(all_close(xs[1].grad(), row.expand({2, 6})));
  EXPECT_TRUE(blocks[1].A.grad().defined());
}

TEST(AlphaStar, IsARatioOfNorms) {
  EXPECT_DOUBLE_EQ(formulas::alpha_star_input(3, 4), 0.75);
  EXPECT_DOUBLE_EQ(formulas::alpha_star_input(0, 4), 0);
}

TEST(AlphaStar, ByWeightsTakesTheLayersBefore) {
  const std::vector<double> norms = {2, 3, 5, 7};
  EXPECT_DOUBLE_EQ(formulas::alpha_star_weight(norms, 4, 1), 5.0 / 7);
  EXPECT_DOUBLE_EQ(formulas::alpha_star_weight(norms, 4, 3), 2.0 / 7);
  EXPECT_DOUBLE_EQ(formulas::alpha_star_weight(norms, 2, 1), 2.0 / 3);
  EXPECT_DOUBLE_EQ(formulas::alpha_star_weight(norms, 4, 4), 1);  // index -1 does not exist
  EXPECT_DOUBLE_EQ(formulas::alpha_star_weight(norms, 1, 1), 1);
}

TEST(Formulas, RefuseWhatHasNoMeaning) {
  const std::vector<Block> blocks = paper_blocks();
  EXPECT_TRUE(refuses([&] { formulas::forward_bs(blocks, 2, 1, x0()); }, "got 2 of 2 blocks"));
  EXPECT_TRUE(refuses([&] { formulas::merged_bs(blocks, 1, -2); }, "m must be -1 (all)"));
  EXPECT_TRUE(refuses([&] { formulas::forward_ms(blocks, 1, 1, {x0()}); }, "got 1 tensors"));
  EXPECT_TRUE(refuses([&] { formulas::merged_ms_weight(blocks, 1, {1, 1}); }, "alpha_star must"));
  EXPECT_TRUE(refuses([] { formulas::alpha_star_input(1, 0); }, "greater than 0; got 0"));
  EXPECT_TRUE(refuses([] { formulas::alpha_star_input(1.0 / 0.0, 1); }, "must be finite"));
  EXPECT_TRUE(refuses([] { formulas::alpha_star_weight({1, 1}, 2, 0); }, "k must lie in [1, n]"));
  EXPECT_TRUE(refuses([] { formulas::alpha_star_weight({1}, 2, 1); }, "merged_norms must hold"));
}

}  // namespace
}  // namespace reslora
