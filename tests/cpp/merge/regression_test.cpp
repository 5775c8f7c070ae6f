// The regression merge: fits against equations and rows written out here, and collecting under
// limits of memory. Layers merged by it are in lsq_test.cpp, what plans make of fits in
// merge_test.cpp.
#include <ATen/ATen.h>
#include <reslora/regression.h>

#include <cmath>
#include <limits>

#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using formulas::Block;
using testing::all_close;
using testing::random;
using testing::random_blocks;
using testing::refuses;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
// Of a layer of random_blocks (in 6, r 3): its own sums, and the covariance of its x.
constexpr int64_t kOwnBytes = 8 * 3 * (6 + 1);
constexpr int64_t kCovBytes = 8 * 6 * (6 + 1);

/// Rows of one layer: v = A x + a linear part + what no linear function of x explains.
struct Rows {
  Tensor x;
  Tensor v;
};

Rows rows_of(const Tensor& A, int64_t count, uint64_t seed) {
  const int64_t in = A.size(1);
  const int64_t r = A.size(0);
  const Tensor x = at::mm(random({count, in}, seed), random({in, in}, 11)) + random({in}, 12);
  const Tensor taps = at::mm(x, 0.5 * random({in, r}, 13)) + 0.7 * random({count, r}, seed + 1);
  return {x, at::mm(x, A.to(at::kDouble).t()) + taps + 0.4};
}

FitSums sums_of(const Rows& rows) {
  return {at::mm(rows.x.t(), rows.x),
          at::mm(rows.v.t(), rows.x),
          rows.x.sum(0),
          rows.v.sum(0),
          rows.v.pow(2).sum().item<double>(),
          rows.x.size(0)};
}

double mean_square(const Tensor& x) { return x.pow(2).sum(1).mean().item<double>(); }

/// sum c_j A_j with the factors that fit v best, each held to `known` by so many of its squares.
Tensor anchored(const Rows& rows, const std::vector<Tensor>& A, std::vector<double> known = {},
                double share = 1e-3) {
  std::vector<Tensor> columns;
  for (const Tensor& own : A) columns.push_back(at::mm(rows.x, own.t()).flatten());
  const Tensor wide = at::stack(columns, 1);
  known.resize(A.size());
  if (share == 1e-3) known[0] = 1;
  const Tensor before = at::tensor(known, at::kDouble);
  const Tensor held = at::diag(wide.pow(2).sum(0) * share);
  const Tensor factors = at::linalg_solve(
      at::mm(wide.t(), wide) + held, at::mv(wide.t(), rows.v.flatten()) + at::mv(held, before));
  Tensor anchor = at::zeros_like(A[0]);
  for (size_t i = 0; i < A.size(); ++i) anchor.add_(A[i], factors[i].item<double>());
  return anchor;
}

/// A' of the normal equations A' (sum x x^T + lambda I) = sum v x^T + lambda A0.
Tensor solved(const Rows& rows, const Tensor& anchor, double lambda) {
  const Tensor left = at::mm(rows.x.t(), rows.x) + lambda * at::eye(rows.x.size(1), at::kDouble);
  return at::linalg_solve(left, at::mm(rows.x.t(), rows.v) + lambda * anchor.t()).t();
}

/// The fit of A with the options as they are.
Tensor fitted(const Rows& rows, const Tensor& A) {
  return solved(rows, anchored(rows, {A}), FitOptions().ridge * mean_square(rows.x));
}

/// [A', offset] of the equations with a column of ones beside x, whose weight takes no ridge.
std::pair<Tensor, Tensor> solved_affine(const Rows& rows, const Tensor& A, double lambda) {
  const int64_t in = A.size(1);
  const Tensor wide = at::cat({rows.x, at::ones({rows.x.size(0), 1}, at::kDouble)}, 1);
  Tensor ridge = lambda * at::eye(in + 1, at::kDouble);
  ridge[in][in] = 0;
  const Tensor own = at::cat({A.t(), at::zeros({1, A.size(0)}, at::kDouble)}, 0);
  const Tensor both =
      at::linalg_solve(at::mm(wide.t(), wide) + ridge, at::mm(wide.t(), rows.v) + lambda * own);
  return {both.narrow(0, 0, in).t(), both[in]};
}

double frobenius(const Tensor& tensor) { return tensor.to(at::kDouble).norm().item<double>(); }

double residual(const Rows& rows, const Tensor& A, const Tensor& offset = at::zeros({1})) {
  return frobenius(rows.v - at::mm(rows.x, A.t()) - offset) / frobenius(rows.v);
}

FitOptions with_ridge(double ridge) {
  FitOptions options;
  options.ridge = ridge;
  return options;
}

// ---- solve_fit

class SolveFit : public ::testing::TestWithParam<double> {};

TEST_P(SolveFit, EqualsTheNormalEquations) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = rows_of(A, 50, 2);
  const double lambda = GetParam() * mean_square(rows.x);
  const Fit fit = solve_fit(sums_of(rows), A, with_ridge(GetParam()), "q");
  const Tensor expected = solved(rows, anchored(rows, {A}), lambda);
  EXPECT_TRUE(all_close(fit.A, expected, 1e-9));
  EXPECT_GT(frobenius(fit.A - A), 1e-3);
  EXPECT_NEAR(fit.residual, residual(rows, expected), 1e-7);
  const Tensor own = at::mm(rows.x, A.t());
  EXPECT_NEAR(fit.alpha_star, ((own * rows.v).sum() / own.pow(2).sum() - 1).item<double>(), 1e-9);
  EXPECT_EQ(fit.rows, 50);
  EXPECT_EQ(fit.A.scalar_type(), at::kDouble);
  EXPECT_FALSE(fit.B.defined() || fit.affine_A.defined() || fit.offset.defined());
}

TEST_P(SolveFit, AffineEqualsTheAugmentedEquations) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = rows_of(A, 50, 2);
  FitOptions options = with_ridge(GetParam());
  options.affine = true;
  const Fit fit = solve_fit(sums_of(rows), A, options, "q");
  // The ridge is measured on what is solved: rows around their mean.
  const Rows centred = {rows.x - rows.x.mean(0), rows.v - rows.v.mean(0)};
  const double lambda = GetParam() * mean_square(centred.x);
  const auto [expected, offset] = solved_affine(rows, anchored(centred, {A}), lambda);
  EXPECT_TRUE(all_close(fit.affine_A, expected, 1e-8));
  EXPECT_TRUE(all_close(fit.offset, offset, 1e-8));
  EXPECT_NEAR(fit.affine_residual, residual(rows, expected, offset), 1e-7);
  EXPECT_LT(fit.affine_residual, fit.residual);
  const Tensor linear = solved(rows, anchored(rows, {A}), GetParam() * mean_square(rows.x));
  EXPECT_TRUE(all_close(fit.A, linear, 1e-9));
}

TEST_P(SolveFit, AnAnchorMayBeMadeOfSeveralAAndOfWhatTheNormsSay) {
  const Tensor A = random({3, 6}, 1), B = random({3, 6}, 21), C = random({3, 6}, 22);
  const Rows rows = rows_of(A, 50, 2);
  const double lambda = GetParam() * mean_square(rows.x);
  const auto with_anchor = [&](const FitAnchor& anchor) {
    return solve_fit(sums_of(rows), A, with_ridge(GetParam()), "q", anchor).A;
  };
  EXPECT_TRUE(
      all_close(with_anchor({{B, C}, {}}), solved(rows, anchored(rows, {A, B, C}), lambda), 1e-9));
  const double share = kPriorRows / 50;
  EXPECT_TRUE(all_close(with_anchor({{B, C}, {1, 0.4, 2}}),
                        solved(rows, anchored(rows, {A, B, C}, {1, 0.4, 2}, share), lambda), 1e-9));
  EXPECT_TRUE(all_close(with_anchor({{}, {1.7}}),
                        solved(rows, anchored(rows, {A}, {1.7}, share), lambda), 1e-9));
}

INSTANTIATE_TEST_SUITE_P(Regression, SolveFit, ::testing::Values(1e-8, 1e-4, 0.3, 20.0));

TEST(SolveFit, ChangesNeitherTheSumsNorA) {
  const Tensor A = random({3, 6}, 1).to(at::kFloat).requires_grad_(true);
  const FitSums sums = sums_of(rows_of(A.detach(), 20, 2));
  const Tensor xx = sums.xx.clone();
  FitOptions options;
  options.affine = true;
  const Fit fit = solve_fit(sums, A, options, "q");
  EXPECT_TRUE(at::equal(sums.xx, xx));
  EXPECT_EQ(fit.A.scalar_type(), at::kFloat);
  EXPECT_EQ(fit.offset.scalar_type(), at::kFloat);
  EXPECT_FALSE(fit.A.requires_grad());
}

TEST(SolveFit, AHugeRidgeKeepsAMultipleOfA) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = rows_of(A, 50, 2);
  const Fit fit = solve_fit(sums_of(rows), A, with_ridge(1e8), "q");
  const Tensor kept = anchored(rows, {A});
  EXPECT_TRUE(all_close(kept, A * (kept[0][0] / A[0][0]), 1e-12));
  EXPECT_TRUE(all_close(fit.A, kept, 1e-7));
  EXPECT_NEAR(fit.residual, residual(rows, kept), 1e-6);
}

TEST(SolveFit, FewerRowsThanFeaturesAreFitted) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = rows_of(A, 2, 2);
  const Fit fit = solve_fit(sums_of(rows), A, with_ridge(1e-6), "q");
  const Tensor expected = solved(rows, anchored(rows, {A}), 1e-6 * mean_square(rows.x));
  EXPECT_TRUE(all_close(fit.A, expected, 1e-6));
  EXPECT_LT(residual(rows, fit.A), 1e-2);
}

TEST(SolveFit, AMultipleOfAIsAlphaStarAlone) {
  const Tensor A = random({3, 6}, 1);
  const Tensor x = random({30, 6}, 2);
  const Fit fit = solve_fit(sums_of({x, 2.5 * at::mm(x, A.t())}), A, with_ridge(1e-10), "q");
  EXPECT_NEAR(fit.alpha_star, 1.5, 1e-9);
  EXPECT_LT(fit.residual, 1e-6);
  const Fit few = solve_fit(sums_of({x, 2.5 * at::mm(x, A.t())}), A, {}, "q");
  EXPECT_LT(few.residual, 1e-2) << "the anchor holds it whatever the ridge";
}

TEST(SolveFit, AnXOfZerosKeepsAAndLeavesAllOfV) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = {at::zeros({8, 6}, at::kDouble), random({8, 3}, 3)};
  const Fit fit = solve_fit(sums_of(rows), A, {}, "q");
  EXPECT_TRUE(at::equal(fit.A, A));
  EXPECT_EQ(fit.alpha_star, 0);
  EXPECT_NEAR(fit.residual, 1, 1e-12);  // |v - A' 0| over |v|
  const Rows silent = {rows.x, at::zeros({8, 3}, at::kDouble)};
  EXPECT_EQ(solve_fit(sums_of(silent), A, {}, "q").residual, 0);
}

TEST(SolveFit, AConstantXLeavesWhatVVariesInTheAffineForm) {
  const Tensor A = random({3, 6}, 1);
  const Rows rows = {at::ones({8, 6}, at::kDouble), random({8, 3}, 3)};
  FitOptions options;
  options.affine = true;
  const Fit fit = solve_fit(sums_of(rows), A, options, "q");
  EXPECT_TRUE(all_close(fit.offset + at::mv(fit.affine_A, rows.x[0]), rows.v.mean(0), 1e-9));
  EXPECT_NEAR(fit.affine_residual, frobenius(rows.v - rows.v.mean(0)) / frobenius(rows.v), 1e-6);
}

/// The refusal of sums that `spoil` has changed.
::testing::AssertionResult refuses_sums(const std::function<void(FitSums&)>& spoil,
                                        const std::string& part) {
  const Tensor A = random({3, 6}, 1);
  FitSums sums = sums_of(rows_of(A, 20, 2));
  spoil(sums);
  FitOptions options;
  options.affine = true;
  try {
    return refuses([&] { solve_fit(sums, A, options, "layers.3.q"); }, part);
  } catch (const c10::Error& error) {
    return ::testing::AssertionFailure() << error.what_without_backtrace();
  }
}

TEST(SolveFitRefuses, SumsThatAreNotFinite) {
  const std::string part = "layers.3.q";
  for (const double bad : {kNan, kInf, -kInf}) {
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.vv = bad; }, part));
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.vx[1][2] = bad; }, part));
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.xx[2][2] = bad; }, part));
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.xx[1][4] = it.xx[4][1] = bad; }, part));
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.x_sum[3] = bad; }, part));
    EXPECT_TRUE(refuses_sums([=](FitSums& it) { it.v_sum[0] = bad; }, part)) << bad;
  }
}

TEST(SolveFitRefuses, SumsThatDoNotFitA) {
  const std::string part = "layers.3.q";
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.rows = 0; }, "got none for layer layers.3.q"));
  EXPECT_TRUE(refuses_sums(
      [](FitSums& it) {
        it.vx = random({3, 5}, 1);
      },
      "got Double [3, 5] for A Double [3, 6] (layer layers.3.q)"));
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.vx = Tensor(); }, "got none for A"));
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.xx = random({5, 5}, 1); }, part));
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.xx = Tensor(); }, part));
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.x_sum = random({5}, 1); }, part));
  EXPECT_TRUE(refuses_sums([](FitSums& it) { it.v_sum = Tensor(); }, part));
}

TEST(SolveFitRefuses, ARidgeThatCannotServe) {
  const Tensor A = random({3, 6}, 1);
  const FitSums sums = sums_of(rows_of(A, 20, 2));
  for (const double ridge : {0.0, -1.0, kNan, kInf}) {
    EXPECT_TRUE(refuses([&] { solve_fit(sums, A, with_ridge(ridge), "q"); }, "ridge must be"));
    EXPECT_TRUE(refuses([&] { FitCollector({}, with_ridge(ridge)); }, "ridge must be"));
  }
  const Tensor ones = at::ones({2, 2}, at::kDouble);  // singular, whatever 1e-300 adds
  const FitSums singular{ones, at::ones({1, 2}, at::kDouble), ones[0], ones[0].narrow(0, 0, 1), 1,
                         1};
  EXPECT_TRUE(refuses(
      [&] {
        solve_fit(singular, at::ones({1, 2}, at::kDouble), with_ridge(1e-300), "q");
      },
      "(layer q): raise ridge (now 1e-300)"));
}

// ---- FitCollector

/// A chain of `size` layers; its first layer merges exactly, the others need a fit.
ChainView view_of(int64_t size, bool has_bias = true, at::ScalarType dtype = at::kDouble,
                  const std::string& mode = "is") {
  const std::vector<Block> blocks = random_blocks({size, 6, 4, 3, has_bias});
  ChainView view{Chain(ResLoraConfig().res_mode(mode), testing::shapes_of(blocks)), {}};
  for (const Block& block : blocks) {
    view.layers.push_back({block.W.to(dtype, false, true), block.A.to(dtype), block.B.to(dtype),
                           NormWindow(), has_bias ? block.bias.to(dtype, false, true) : Tensor()});
  }
  return view;
}

/// What layer n sees in batch b: 40 rows.
Rows batch_of(const ChainView& view, int64_t n, uint64_t b) {
  return rows_of(view.layers[n].A, 40, 1000 + 100 * b + 2 * static_cast<uint64_t>(n));
}

Rows both_batches(const ChainView& view, int64_t n) {
  const Rows first = batch_of(view, n, 0);
  const Rows second = batch_of(view, n, 1);
  return {at::cat({first.x, second.x}), at::cat({first.v, second.v})};
}

/// Runs two batches through a collector of one chain, as often as it asks for them.
FitCollector collected(const ChainView& view, const FitOptions& options) {
  FitCollector collector({view}, options);
  do {
    for (const uint64_t b : {0U, 1U}) {
      for (int64_t n = 0; n < view.chain.size(); ++n) {
        const Rows rows = batch_of(view, n, b);
        collector.add(0, n, rows.x, rows.v);
      }
      collector.end_batch();
    }
  } while (collector.finish_pass());
  return collector;
}

::testing::AssertionResult has_fits(const FitCollector& collector, double tolerance) {
  const ChainView& view = collector.views()[0];
  for (int64_t n = 1; n < view.chain.size(); ++n) {
    const Rows rows = both_batches(view, n);
    const Tensor expected = fitted(rows, view.layers[n].A);
    const Fit& fit = view.layers[n].fit;
    if (!fit.A.defined()) return ::testing::AssertionFailure() << "no fit of layer " << n;
    const auto result = all_close(fit.A, expected, tolerance);
    if (!result) return ::testing::AssertionFailure() << "layer " << n << result.message();
    if (fit.rows != 80 || std::abs(fit.residual - residual(rows, expected)) > 10 * tolerance) {
      return ::testing::AssertionFailure() << "layer " << n << " residual " << fit.residual;
    }
  }
  return ::testing::AssertionSuccess();
}

TEST(FitCollector, FitsEveryLinkedLayerAndLeavesExactOnesOut) {
  const FitCollector collector = collected(view_of(4), {});
  EXPECT_TRUE(has_fits(collector, 1e-9));
  EXPECT_FALSE(collector.views()[0].layers[0].fit.A.defined());
  EXPECT_EQ(collector.cost().passes, 1);
  EXPECT_EQ(collector.cost().peak_bytes, 3 * (kOwnBytes + kCovBytes));
  EXPECT_EQ(collector.cost().row_file_bytes, 0);
  FitCollector nothing({view_of(3, true, at::kDouble, "bs")});
  nothing.add(0, 1, random({5, 6}, 1), random({5, 6}, 2));  // two blocks: [.., 2 r]
  EXPECT_FALSE(nothing.finish_pass());
  EXPECT_EQ(nothing.cost().peak_bytes, 0);
}

class FitCollectorDtype : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(FitCollectorDtype, SumsManyRowsInTheirPrecision) {
  const ChainView view = view_of(2, true, at::kFloat);
  const Rows exact = rows_of(view.layers[1].A, 2 * 4500, 5);  // above a chunk of rows
  const Tensor x = exact.x.to(GetParam()).view({2, 4500, 6});
  const Tensor v = exact.v.to(GetParam()).view({2, 4500, 3});
  FitCollector collector({view});
  collector.add(0, 1, x, v);
  EXPECT_FALSE(collector.finish_pass());
  const Fit& fit = collector.views()[0].layers[1].fit;
  const Rows rounded = {x.to(at::kDouble).view({-1, 6}), v.to(at::kDouble).view({-1, 3})};
  const Tensor A = view.layers[1].A.to(at::kDouble);
  const Tensor expected = fitted(rounded, A);
  EXPECT_TRUE(all_close(fit.A, expected, GetParam() == at::kDouble ? 1e-6 : 1e-4));
  EXPECT_EQ(fit.A.scalar_type(), at::kFloat);
  EXPECT_NEAR(fit.residual, residual(rounded, expected), 5e-5);
  EXPECT_EQ(fit.rows, 9000);
}

INSTANTIATE_TEST_SUITE_P(Regression, FitCollectorDtype,
                         ::testing::Values(at::kDouble, at::kFloat, at::kBFloat16));

TEST(FitCollector, LayersThatReadOneTensorShareItsCovariance) {
  const ChainView view = view_of(2);
  const Rows q = batch_of(view, 1, 0);
  FitOptions options;
  options.keep_sums = true;
  FitCollector shared({view, view}, options);
  shared.add(0, 1, q.x, q.v);
  shared.add(1, 1, q.x, 2 * q.v);
  EXPECT_FALSE(shared.finish_pass());
  EXPECT_EQ(shared.cost().peak_bytes, 2 * kOwnBytes + kCovBytes);
  EXPECT_TRUE(shared.sums(0, 1)->xx.is_same(shared.sums(1, 1)->xx));
  FitCollector apart({view, view}, options);
  apart.add(0, 1, q.x, q.v);
  apart.add(1, 1, q.x.clone(), 2 * q.v);
  EXPECT_FALSE(apart.finish_pass());
  EXPECT_EQ(apart.cost().peak_bytes, 2 * (kOwnBytes + kCovBytes));
  for (const size_t c : {0U, 1U}) {
    const Fit& fit = shared.views()[c].layers[1].fit;
    EXPECT_TRUE(at::equal(fit.A, apart.views()[c].layers[1].fit.A));
    EXPECT_EQ(fit.rows, 40);
    const Rows rows = {q.x, static_cast<double>(c + 1) * q.v};
    EXPECT_TRUE(all_close(fit.A, fitted(rows, view.layers[1].A), 1e-9));
  }
}

TEST(FitCollector, ATensorThatWasWrittenToIsNotShared) {
  const ChainView view = view_of(2);
  const Rows rows = batch_of(view, 1, 0);
  FitCollector collector({view, view});
  collector.add(0, 1, rows.x, rows.v);
  collector.add(1, 1, rows.x.add_(1), rows.v);
  EXPECT_EQ(collector.cost().peak_bytes, 2 * (kOwnBytes + kCovBytes));
}

TEST(FitCollector, TheMaskLeavesRowsOut) {
  const ChainView view = view_of(2);
  const Rows rows = batch_of(view, 1, 0);
  const Tensor mask = random({2, 20}, 3) > 0;
  const Tensor kept = mask.view({-1}).nonzero().view({-1});
  Rows dirty = {rows.x.clone(), rows.v.clone()};
  dirty.x.masked_fill_(mask.view({-1, 1}).logical_not(), kNan);
  FitCollector collector({view});
  collector.begin_batch({at::Tensor(), mask.to(at::kLong)});  // as an attention mask comes
  collector.add(0, 1, dirty.x.view({2, 20, 6}), dirty.v.view({2, 20, 3}));
  EXPECT_FALSE(collector.finish_pass());
  const Rows expected = {rows.x.index_select(0, kept), rows.v.index_select(0, kept)};
  const Fit& fit = collector.views()[0].layers[1].fit;
  ASSERT_LT(kept.size(0), 40);
  EXPECT_EQ(fit.rows, kept.size(0));
  EXPECT_TRUE(all_close(fit.A, fitted(expected, view.layers[1].A), 1e-9));
}

TEST(FitCollector, ALimitOfMemorySplitsIntoPassesWithTheSameFits) {
  const ChainView view = view_of(6);
  const FitCollector whole = collected(view, {});
  for (const int64_t at_once : {1, 2, 4}) {
    FitOptions options;
    options.max_cov_bytes = at_once * (kOwnBytes + kCovBytes);
    const FitCollector split = collected(view, options);
    EXPECT_EQ(split.cost().passes, (5 + at_once - 1) / at_once);
    EXPECT_EQ(split.cost().peak_bytes, options.max_cov_bytes);
    EXPECT_EQ(split.cost().row_file_bytes, 0);
    EXPECT_TRUE(has_fits(split, 1e-9));
    for (size_t n = 1; n < 6; ++n) {
      EXPECT_TRUE(at::equal(split.views()[0].layers[n].fit.A, whole.views()[0].layers[n].fit.A));
    }
  }
}

TEST(FitCollector, ALayerAboveTheLimitGoesToARowFileWithTheSameFit) {
  for (const int64_t limit : {kOwnBytes + kCovBytes - 1, int64_t{0}}) {
    FitOptions options;
    options.max_cov_bytes = limit;
    options.keep_sums = true;
    const FitCollector collector = collected(view_of(4), options);
    EXPECT_TRUE(has_fits(collector, 1e-4));
    EXPECT_EQ(collector.cost().passes, limit == 0 ? 3 : 2);
    EXPECT_EQ(collector.cost().row_file_bytes, 3 * 80 * 6 * 4);
    EXPECT_GT(collector.cost().solver_steps, 0);
    EXPECT_FALSE(collector.sums(0, 1).has_value());
    const FitCollector whole = collected(view_of(4), {});
    for (size_t n = 1; n < 4; ++n) {
      EXPECT_NEAR(collector.views()[0].layers[n].fit.alpha_star,
                  whole.views()[0].layers[n].fit.alpha_star, 1e-4);
    }
  }
}

TEST(FitCollector, LayersShareARowFile) {
  const ChainView view = view_of(2);
  const Rows rows = rows_of(view.layers[1].A, 4200, 5);  // above a chunk of the file
  FitOptions options;
  options.max_cov_bytes = 2 * kOwnBytes;
  FitCollector collector({view, view}, options);
  collector.add(0, 1, rows.x, rows.v);
  collector.add(1, 1, rows.x, -rows.v);
  EXPECT_FALSE(collector.finish_pass());
  EXPECT_EQ(collector.cost().row_file_bytes, 4200 * 6 * 4);
  for (const size_t c : {0U, 1U}) {
    const Rows own = {rows.x, c == 0 ? rows.v : -rows.v};
    EXPECT_TRUE(
        all_close(collector.views()[c].layers[1].fit.A, fitted(own, view.layers[1].A), 1e-4));
  }
}

TEST(FitCollector, KeepsTheSumsOfALaterSolve) {
  FitOptions options;
  options.keep_sums = true;
  options.affine = true;
  const FitCollector collector = collected(view_of(3), options);
  const LayerView& layer = collector.views()[0].layers[2];
  ASSERT_TRUE(collector.sums(0, 2).has_value());
  EXPECT_FALSE(collector.sums(0, 0).has_value());
  const Fit again = solve_fit(*collector.sums(0, 2), layer.A, options, "again");
  EXPECT_TRUE(at::equal(again.A, layer.fit.A));
  EXPECT_TRUE(at::equal(again.offset, layer.fit.offset));
  EXPECT_FALSE(collected(view_of(3), {}).sums(0, 2).has_value());
}

TEST(FitCollector, AnOffsetIsFittedWhereThereIsABias) {
  ChainView view = view_of(3);
  view.layers[2].bias = Tensor();
  FitOptions options;
  options.affine = true;
  const FitCollector collector = collected(view, options);
  EXPECT_TRUE(collector.views()[0].layers[1].fit.offset.defined());
  EXPECT_FALSE(collector.views()[0].layers[2].fit.offset.defined());
  EXPECT_TRUE(refuses([&] { FitCollector({view_of(3, false)}, options); }, "got none"));
}

TEST(FitCollectorRefuses, ALayerWithoutRowsByItsName) {
  const ChainView view = view_of(3);
  FitCollector collector({view});
  const Rows rows = batch_of(view, 1, 0);
  collector.add(0, 1, rows.x, rows.v);
  EXPECT_TRUE(refuses([&] { collector.finish_pass(); }, "got none for layer layer.2"));
  FitCollector masked({view_of(2)});
  masked.begin_batch({at::zeros({40}, at::kBool)});
  masked.add(0, 1, rows.x, rows.v);
  EXPECT_TRUE(refuses([&] { masked.finish_pass(); }, "got none for layer layer.1"));
}

TEST(FitCollectorRefuses, RowsThatAreNotFiniteByTheLayersName) {
  const ChainView view = view_of(3);
  for (const double bad : {kNan, kInf}) {
    for (const bool is_in_x : {true, false}) {
      for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
        FitOptions options;
        options.max_cov_bytes = limit;
        FitCollector collector({view}, options);
        const Rows rows = batch_of(view, 1, 0);
        (is_in_x ? rows.x : rows.v)[3][1] = bad;
        collector.add(0, 1, rows.x, rows.v);
        EXPECT_TRUE(refuses([&] { collector.finish_pass(); }, "NaN or infinity (layer layer.1)"));
      }
    }
  }
}

TEST(FitCollector, APartnerInSomeCallsOnlyIsFittedOnItsOwnRows) {
  const ChainView view = view_of(2);
  const Rows a = batch_of(view, 1, 0);
  const Rows b = batch_of(view, 1, 1);
  using Calls = std::vector<std::pair<size_t, const Rows*>>;  // of two chains
  const std::vector<Calls> forwards = {{{0, &a}, {1, &a}, {0, &a}, {1, &b}},
                                       {{0, &a}, {1, &b}, {0, &a}, {1, &a}},
                                       {{0, &a}, {1, &a}, {0, &b}},
                                       {{0, &a}, {1, &a}, {1, &a}, {0, &b}},
                                       {{0, &a}, {0, &a}, {1, &a}, {1, &b}}};
  for (const Calls& calls : forwards) {
    FitCollector collector({view, view});
    do {
      for (const auto& [c, rows] : calls) collector.add(c, 1, rows->x, rows->v);
    } while (collector.finish_pass());
    for (const size_t c : {0U, 1U}) {
      std::vector<Tensor> x, v;
      for (const auto& [own, rows] : calls)
        if (own == c) x.push_back(rows->x), v.push_back(rows->v);
      const Rows all = {at::cat(x), at::cat(v)};
      const Fit& fit = collector.views()[c].layers[1].fit;
      const Tensor expected = fitted(all, view.layers[1].A);
      EXPECT_TRUE(all_close(fit.A, expected, 1e-9));
      EXPECT_EQ(fit.rows, all.x.size(0));
    }
  }
}

TEST(FitCollectorRefuses, ShapesThatDoNotFit) {
  FitCollector collector({view_of(2)});
  const auto add = [&](const Tensor& x, const Tensor& v) {
    return [=, &collector] { collector.add(0, 1, x, v); };
  };
  const Tensor x = random({4, 6}, 1);
  const Tensor v = random({4, 3}, 2);
  EXPECT_TRUE(refuses(add(random({4, 5}, 1), v), "rows [..., 6] in memory; got Double [4, 5]"));
  EXPECT_TRUE(
      refuses(add(x, random({4, 4}, 2)), "[..., 3] in memory; got Double [4, 4] (layer la"));
  EXPECT_TRUE(refuses(add(x, random({5, 3}, 2)), "the same rows"));
  FitOptions options;
  options.max_cov_bytes = -1;
  EXPECT_TRUE(refuses([&] { FitCollector({}, options); }, "max_cov_bytes must not be negative"));
}

}  // namespace
}  // namespace reslora
