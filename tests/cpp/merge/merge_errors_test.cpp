// Planned pairs reduced to a rank, and what a planned merge changes on rows that a layer saw.
#include <reslora/merge.h>
#include <reslora/merge_errors.h>
#include <reslora/plain_lora.h>

#include <cmath>

#include "testing.h"

namespace reslora {
namespace {

using formulas::Block;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

double frobenius(const at::Tensor& matrix) { return matrix.norm().item<double>(); }

ChainView view_of(const std::vector<Block>& blocks, const std::string& mode, at::ScalarType dtype) {
  ChainView view{Chain(ResLoraConfig().res_mode(mode), testing::shapes_of(blocks)), {}};
  for (const Block& block : blocks)
    view.layers.push_back({block.W.to(dtype, false, true), block.A, block.B, NormWindow()});
  return view;
}

/// A pair of rank 5 in 8 x 7 whose product has singular values 8, 4, 2, 1, 0.5.
LayerMerge known_values() {
  const at::Tensor left = std::get<0>(at::linalg_qr(random({8, 5}, 1)));
  const at::Tensor right = std::get<0>(at::linalg_qr(random({7, 5}, 2)));
  const at::Tensor mix = random({5, 5}, 3);  // so that the factors show nothing of the values
  const at::Tensor values = at::tensor({8.0, 4.0, 2.0, 1.0, 0.5}, at::kDouble);
  return {"q",
          MergeRule::kExact,
          {},
          at::mm(mix, right.t()),
          at::mm(left * values, at::linalg_inv(mix))};
}

TEST(ReducedFactors, LoseTheSingularValuesThatTheyDiscard) {
  const LayerMerge layer = known_values();
  const at::Tensor product = at::mm(layer.B, layer.A);
  double lost = 85.25;  // the squares' sum
  for (int64_t rank = 1; rank <= 6; ++rank) {
    const ReducedFactors reduced = reduced_factors(layer, rank);
    lost -= rank > 5 ? 0 : std::pow(4.0, 4 - rank);
    EXPECT_EQ(reduced.layer.A.size(0), std::min<int64_t>(rank, 5));
    EXPECT_NEAR(reduced.error, std::sqrt(lost / 85.25), 1e-7) << rank;
    EXPECT_NEAR(frobenius(product - at::mm(reduced.layer.B, reduced.layer.A)), std::sqrt(lost),
                1e-10);
  }
  EXPECT_EQ(reduced_factors(layer, 9, 0.13).layer.B.size(1), 3);  // 0.1211 of it is 1 and 0.5
  EXPECT_EQ(reduced_factors(layer, 9, 0.12).layer.B.size(1), 4);
}

TEST(ReducedFactors, AreExactWhereBlocksDependOnEachOther) {
  std::vector<Block> blocks = random_blocks({3, 8, 7, 2, false});
  blocks[1].A = blocks[0].A;
  const MergePlan plan({view_of(blocks, "bs", at::kDouble)}, "");
  const LayerMerge& layer = plan.layers()[1];  // rank 4 in form, 2 in fact
  const ReducedFactors reduced = reduced_factors(layer, 4);
  EXPECT_EQ(reduced.layer.A.sizes(), at::IntArrayRef({2, 8}));
  EXPECT_TRUE(all_close(at::mm(reduced.layer.B, reduced.layer.A), at::mm(layer.B, layer.A)));
}

TEST(ReducedFactors, AToleranceBelowThePrecisionOfSquaresStillHolds) {
  LayerMerge layer{"q", MergeRule::kExact, {}, at::eye(2, at::kDouble), at::eye(2, at::kDouble)};
  layer.B[1][1] = 1e-9;
  EXPECT_EQ(reduced_factors(layer, 2, 1e-10).layer.A.size(0), 2);
  EXPECT_NEAR(reduced_factors(layer, 1, 1e-10).error, 1e-9, 1e-12);
}

TEST(ReducedFactors, RefuseWhatTheyCannotServe) {
  LayerMerge layer = known_values();
  EXPECT_TRUE(refuses([&] { reduced_factors(layer, 0); }, "at least 1; got 0 (layer q)"));
  for (const double tolerance : {-0.1, 1.0, std::nan("")}) {
    EXPECT_TRUE(refuses([&] { reduced_factors(layer, 2, tolerance); }, "tolerance must lie in"));
  }
  layer.A[0][0] = std::nan("");
  EXPECT_TRUE(refuses([&] { reduced_factors(layer, 2); }, "must be finite"));
}

TEST(LayerErrors, TellTheMethodFromTheRoundingOfTheWeight) {
  const std::vector<Block> blocks = random_blocks({2, 6, 4, 3, false});
  const at::Tensor x = random({2, 5, 6}, 1);
  const at::Tensor s = random({2, 5, 3}, 2);
  const at::Tensor mask = random({2, 5}, 3) > 0;
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    const ChainView view = view_of(blocks, "none", dtype);
    MergePlan plan({view}, "");
    const LayerView& layer = view.layers[1];
    const LayerMerge& planned = plan.layers()[1];
    const at::Tensor y = random({2, 5, 4}, 4);
    const at::Tensor own = at::matmul(x, layer.A.t());
    const LayerErrors exact = layer_errors(planned, x, own, y, {layer.B}, {0.75}, layer.weight);
    EXPECT_LT(exact.method, 1e-24 * exact.whole);
    EXPECT_EQ(exact.rounding > 0, dtype == at::kBFloat16);
    const LayerErrors off = layer_errors(planned, x, s, y, {layer.B}, {0.75}, layer.weight, mask);
    const at::Tensor wrong = 0.75 * at::matmul(own - s, layer.B.t()).index({mask});
    EXPECT_NEAR(off.method, wrong.pow(2).sum().item<double>(), 1e-9);
    EXPECT_NEAR(off.whole, y.index({mask}).pow(2).sum().item<double>(), 1e-9);
    const at::Tensor W = layer.weight.to(at::kDouble, false, true);
    plan.apply();
    const at::Tensor lost = layer.weight.to(at::kDouble) - W - 0.75 * at::mm(layer.B, layer.A);
    const at::Tensor rounded = at::matmul(x, lost.t()).index({mask});
    EXPECT_NEAR(off.rounding, rounded.pow(2).sum().item<double>(), 1e-4 * off.rounding + 1e-20);
    EXPECT_NEAR(off.both, (wrong + rounded).pow(2).sum().item<double>(), 1e-4 * off.both);
  }
  EXPECT_TRUE(refuses([&] { layer_errors(known_values(), x, s, s, {}, {}, {}); }, "(layer q)"));
}

TEST(MergedForward, IsWhatApplyLeaves) {
  const std::vector<Block> blocks = random_blocks({2, 6, 4, 3, true});
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    ChainView view = view_of(blocks, "none", dtype);
    LayerView& layer = view.layers[1];
    layer.bias = blocks[1].bias.to(dtype, false, true);
    const at::Tensor x = random({2, 3, 6}, 1).to(dtype);
    MergePlan plan({view}, "");
    LayerMerge planned = plan.layers()[1];
    const at::Tensor y = merged_forward(planned, x, layer.weight, layer.bias);
    const at::Tensor bare = merged_forward(planned, x, layer.weight, {});
    planned.bias = random({4}, 9);
    const at::Tensor moved = merged_forward(planned, x, layer.weight, layer.bias);
    EXPECT_TRUE(at::equal(layer.bias, blocks[1].bias.to(dtype)));
    EXPECT_TRUE(refuses([&] { merged_forward(planned, x, layer.weight, {}); },
                        "an affine fit needs the bias that it moves; got none (layer "));
    plan.apply();
    EXPECT_TRUE(at::equal(y, at::linear(x, layer.weight, layer.bias)));
    EXPECT_TRUE(at::equal(bare, at::linear(x, layer.weight)));
    const at::Tensor bias = (layer.bias.to(at::kDouble) + planned.bias).to(dtype);
    EXPECT_TRUE(at::equal(moved, at::linear(x, layer.weight, bias)));
  }
}

}  // namespace
}  // namespace reslora
