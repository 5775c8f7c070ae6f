// What a merge may write, and that it reads tensors as they are: weights and biases that layers
// share, that have no memory of their own, and factors that are negated lazily.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <reslora/merge.h>

#include <stdexcept>
#include <vector>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::all_close;
using testing::random;
using testing::refuses;

/// A chain of two plain layers, both 4 -> 4, whose weights may be changed before it is planned.
ChainView two_layers() {
  const Chain chain(ResLoraConfig().res_mode("none"), {{"a", 4, 4, 2, 1}, {"b", 4, 4, 2, 1}});
  ChainView view{chain, {}};
  for (uint64_t n = 0; n < 2; ++n)
    view.layers.push_back({random({4, 4}, n), random({2, 4}, 10 + n), random({4, 2}, 20 + n), {}});
  return view;
}

/// True where applying is refused with `part`, and nothing is changed or taken for applied.
::testing::AssertionResult is_refused_whole(const ChainView& view, const std::string& part) {
  const Tensor before = view.layers[0].weight.clone();
  for (const bool keep_originals : {true, false}) {
    MergePlan plan({view}, "");
    const auto result = refuses([&] { plan.apply(keep_originals); }, part);
    if (!result) return result;
    if (plan.is_applied()) return ::testing::AssertionFailure() << "taken for applied";
    if (!at::equal(before, view.layers[0].weight))
      return ::testing::AssertionFailure() << "the first weight was changed";
  }
  return ::testing::AssertionSuccess();
}

TEST(WrittenWeights, ElementsThatShareMemoryAreRefusedBeforeTheFirstWrite) {
  ChainView view = two_layers();
  view.layers[1].weight = random({4, 1}, 3).expand({4, 4});
  EXPECT_TRUE(is_refused_whole(view, "got Double [4, 4], whose elements share memory (layer b)"));
}

TEST(WrittenWeights, WeightsOfInferenceModeAreRefusedOutsideOfIt) {
  ChainView view = two_layers();
  {
    const c10::InferenceMode guard;
    view.layers[1].weight = random({4, 4}, 3);
  }
  EXPECT_TRUE(is_refused_whole(view, "made in inference mode, outside of it (layer b)"));
  const c10::InferenceMode guard;
  const Tensor before = view.layers[1].weight.clone();
  MergePlan plan({view}, "");
  plan.apply();
  const Tensor added = at::mm(plan.layers()[1].B, plan.layers()[1].A);
  EXPECT_TRUE(all_close(view.layers[1].weight, before + added));
}

/// Two layers after affine fits, which share their bias.
ChainView with_one_bias(bool is_first_moved, bool is_second_moved) {
  ChainView view = two_layers();
  const Tensor bias = random({4}, 5);
  for (LayerView& layer : view.layers) layer.bias = bias;
  const auto fit = [](LayerView& layer) {
    layer.fit.A = layer.fit.affine_A = layer.A;
    layer.fit.offset = random({2}, 6);
  };
  if (is_first_moved) fit(view.layers[0]);
  if (is_second_moved) fit(view.layers[1]);
  return view;
}

TEST(WrittenWeights, AMergeDoesNotGoOnBehindLayersThatWereWrittenToMeanwhile) {
  const ChainView view = two_layers();
  const std::vector<Tensor> weights = {view.layers[0].weight, view.layers[1].weight}, none(2);
  const Tensor base = weights[0].clone();
  const auto halted = [&] {
    MergePlan plan({view}, "");
    const auto fails = [](int64_t) { throw std::runtime_error("no memory"); };
    EXPECT_THROW(plan.apply(/*keep_originals=*/false, /*safe_merge=*/false, fails),
                 std::runtime_error);
    EXPECT_EQ(plan.done(), 1);
    return plan;
  };
  MergePlan plan = halted();
  std::vector<Tensor> moved = {weights[0].clone(), weights[1].clone()};
  plan.go_on_with(moved, none);
  plan.go_on_with(moved, none);
  moved[0].copy_(base);  // as loading a base model's state does
  EXPECT_TRUE(refuses([&] { plan.go_on_with(moved, none); }, "got other values in a: load"));
  EXPECT_TRUE(refuses([&] { plan.go_on_with(weights, none); }, "got Double [4, 4] where"));
}

TEST(WrittenWeights, ABiasOfTwoLayersIsRefusedWhereOneOfThemMovesIt) {
  for (const auto& [first, second] : {std::pair(true, true), {true, false}, {false, true}}) {
    const ChainView view = with_one_bias(first, second);
    const Tensor before = view.layers[0].bias.clone(), weight = view.layers[0].weight.clone();
    MergePlan plan({view}, "lsq");
    EXPECT_TRUE(refuses([&] { plan.apply(); },
                        "must have one of its own; got one shared by a and b: untie them, or plan "
                        "without use_affine"));
    EXPECT_TRUE(at::equal(before, view.layers[0].bias));
    EXPECT_TRUE(at::equal(weight, view.layers[0].weight));
    MergePlan linear({view}, "lsq", /*use_affine=*/false);
    linear.apply();
    EXPECT_TRUE(at::equal(before, view.layers[0].bias));
  }
  MergePlan({with_one_bias(false, false)}, "lsq").apply();
}

TEST(MergedWeight, ReadsTensorsThatAreNegatedLazily) {
  const Tensor W = random({4, 4}, 1).to(at::kFloat), A = random({2, 4}, 2).to(at::kFloat);
  const Tensor B = random({4, 2}, 3).to(at::kFloat);
  const auto lazily = [](const Tensor& tensor) { return at::_neg_view(-tensor); };
  ASSERT_TRUE(lazily(A).is_neg() && at::equal(lazily(A), A));
  const Tensor wanted = W + at::mm(B, A);
  for (const bool is_first : {true, false}) {
    const LayerMerge layer{
        "a", MergeRule::kExact, {}, is_first ? lazily(A) : A, is_first ? B : lazily(B)};
    EXPECT_TRUE(all_close(merged_weight(W, layer), wanted, 1e-6));
    EXPECT_TRUE(all_close(merged_weight(lazily(W), layer), wanted, 1e-6));
  }
}

}  // namespace
}  // namespace reslora
