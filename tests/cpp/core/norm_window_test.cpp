// The ring of norms: filling, means, and what is refused.
#include <reslora/norm_window.h>

#include "testing.h"

namespace reslora {
namespace {

using testing::refuses;

TEST(NormWindow, UndefinedHasNoMean) {
  const NormWindow window;
  EXPECT_FALSE(window.is_defined());
  EXPECT_EQ(window.filled(), 0);
  EXPECT_FALSE(window.mean(Norm::kInput).has_value());
}

TEST(NormWindow, NewRingIsEmpty) {
  const NormWindow window(4, at::kCPU);
  EXPECT_TRUE(window.is_defined());
  EXPECT_EQ(window.norms().sizes(), at::IntArrayRef({2, 4}));
  EXPECT_EQ(window.filled(), 0);
  EXPECT_FALSE(window.mean(Norm::kOwnProduct).has_value());
}

NormWindow window_of(int64_t count) {
  const at::Tensor norms = at::tensor({1.0, 2.0, 6.0, 10.0, 20.0, 60.0}, at::kFloat).view({2, 3});
  return {norms, at::full({1}, count, at::kLong)};
}

TEST(NormWindow, MeanTakesOnlyWhatWasWritten) {
  EXPECT_DOUBLE_EQ(*window_of(1).mean(Norm::kInput), 1);
  EXPECT_DOUBLE_EQ(*window_of(2).mean(Norm::kInput), 1.5);
  EXPECT_DOUBLE_EQ(*window_of(2).mean(Norm::kOwnProduct), 15);
}

TEST(NormWindow, FullRingUsesEveryEntryHoweverOftenItWentRound) {
  EXPECT_EQ(window_of(3).filled(), 3);
  EXPECT_EQ(window_of(1000).filled(), 3);
  EXPECT_DOUBLE_EQ(*window_of(1000).mean(Norm::kInput), 3);
  EXPECT_DOUBLE_EQ(*window_of(1000).mean(Norm::kOwnProduct), 30);
}

TEST(NormWindow, EntriesComeOldestFirst) {
  EXPECT_TRUE(at::equal(window_of(2).in_order(), window_of(2).norms().narrow(1, 0, 2)));
  EXPECT_TRUE(at::equal(window_of(3).in_order(), window_of(3).norms()));
  // The fourth forward went to column 0, so that column 1 holds the oldest.
  const at::Tensor wanted = at::tensor({2.0, 6.0, 1.0, 20.0, 60.0, 10.0}, at::kFloat).view({2, 3});
  EXPECT_TRUE(at::equal(window_of(4).in_order(), wanted));
  EXPECT_EQ(window_of(0).in_order().size(1), 0);
}

TEST(NormWindow, OfSeveralRanksIsTheRootOfTheMeanSquare) {
  const NormWindow own = window_of(3);
  const at::Tensor squares = at::full({2, 3}, 9.0, at::kDouble) + at::full({2, 3}, 41.0);
  set_to_mean_of_ranks(own.norms(), squares, 2);
  EXPECT_TRUE(at::equal(own.norms(), at::full({2, 3}, 5.0, at::kFloat)));
  EXPECT_TRUE(refuses([&] { set_to_mean_of_ranks(own.norms(), squares, 0); }, "of 0"));
  EXPECT_TRUE(refuses([&] { set_to_mean_of_ranks(own.norms(), squares[0], 2); }, "shape of norms"));
}

TEST(NormWindow, RefusesWhatIsNoRing) {
  const at::Tensor norms = at::zeros({2, 3}, at::kFloat);
  const at::Tensor count = at::zeros({1}, at::kLong);
  EXPECT_TRUE(refuses([] { NormWindow(0, at::kCPU); },
                      "size must be at least 1 and at most 131072; got 0"));
  EXPECT_TRUE(refuses(
      [&] {
        NormWindow(at::zeros({3, 3}), count);
      },
      "norms must be float32 [2, N]"));
  EXPECT_TRUE(refuses(
      [&] {
        NormWindow(at::zeros({2, 0}), count);
      },
      "norms must be float32 [2, N]"));
  EXPECT_TRUE(refuses([&] { NormWindow(norms.to(at::kDouble), count); }, "got Double [2, 3]"));
  EXPECT_TRUE(refuses([&] { NormWindow(norms, at::zeros({1}, at::kInt)); }, "got Int [1]"));
  EXPECT_TRUE(refuses([&] { NormWindow(norms, at::Tensor()); }, "must both be given"));
  EXPECT_TRUE(
      refuses([&] { NormWindow(norms, count - 1).filled(); }, "count must not be negative"));
}

}  // namespace
}  // namespace reslora
