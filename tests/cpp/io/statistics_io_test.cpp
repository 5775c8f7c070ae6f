// Statistics beside an adapter: round trips of every part, and files that are refused.
#include <ATen/ATen.h>
#include <reslora/adapter_io.h>
#include <reslora/statistics_io.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "io/in_folder.h"
#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using testing::random;
using testing::refuses;
using Statistics = std::map<std::string, LayerStatistics>;

constexpr const char* kSum = "0123abcd";

class StatisticsIo : public testing::InFolder {
 protected:
  void SetUp() override {
    InFolder::SetUp();
    path_ = path("statistics.safetensors");
  }

  /// True where the file of `statistics`, changed by `spoil`, is refused with `part`.
  ::testing::AssertionResult refuses_file(const Statistics& statistics,
                                          const std::function<void(TensorFile&)>& spoil,
                                          const std::string& part) const {
    save_statistics(path_, kSum, statistics);
    load_statistics(path_, kSum);  // a good file, before it is spoiled
    TensorFile file = load_tensors(path_);
    spoil(file);
    save_tensors(path_, file);
    return refuses([&] { load_statistics(path_, kSum); }, part);
  }

  std::string path_;
};

FitSums sums_of(const Tensor& xx, uint64_t seed) {
  return {xx, random({3, 6}, seed), random({6}, seed + 1), random({3}, seed + 2), 12.5, 40};
}

Fit full_fit(at::ScalarType dtype) {
  return {random({3, 6}, 1).to(dtype),
          random({4, 3}, 2).to(dtype),
          random({3, 6}, 3).to(dtype),
          random({3}, 4).to(dtype),
          -0.1,
          0.3,
          0.2,
          (int64_t{1} << 40) + 1,
          7};
}

/// q and k read the same x; the last layer has norms only.
Statistics sample() {
  const Tensor xx = random({6, 6}, 20);
  Statistics statistics;
  statistics["l.0.k"].sums = sums_of(xx, 30);
  statistics["l.0.q"].sums = sums_of(xx, 40);
  statistics["l.0.q"].fit = full_fit(at::kDouble);
  statistics["l.0.q"].norms =
      NormWindow(random({2, 5}, 50).to(at::kFloat), at::full({1}, 123, at::kLong));
  statistics["l.0.v"].fit.A = random({2, 6}, 60).to(at::kFloat);
  statistics["l.1.q"].norms = NormWindow(at::ones({2, 3}), at::zeros({1}, at::kLong));
  return statistics;
}

bool is_same(const Tensor& got, const Tensor& wanted) {
  if (!wanted.defined()) return !got.defined();
  return got.defined() && got.scalar_type() == wanted.scalar_type() && at::equal(got, wanted);
}

void expect_same_fit(const Fit& got, const Fit& wanted) {
  EXPECT_TRUE(is_same(got.A, wanted.A));
  EXPECT_TRUE(is_same(got.B, wanted.B));
  EXPECT_TRUE(is_same(got.affine_A, wanted.affine_A));
  EXPECT_TRUE(is_same(got.offset, wanted.offset));
  EXPECT_EQ(got.alpha_star, wanted.alpha_star);
  EXPECT_EQ(got.residual, wanted.residual);
  EXPECT_EQ(got.affine_residual, wanted.affine_residual);
  EXPECT_EQ(got.rows, wanted.rows);
  EXPECT_EQ(got.refine_steps, wanted.refine_steps);
}

void expect_same_sums(const FitSums& got, const FitSums& wanted) {
  EXPECT_TRUE(is_same(got.xx, wanted.xx));
  EXPECT_TRUE(is_same(got.vx, wanted.vx));
  EXPECT_TRUE(is_same(got.x_sum, wanted.x_sum));
  EXPECT_TRUE(is_same(got.v_sum, wanted.v_sum));
  EXPECT_EQ(got.vv, wanted.vv);
  EXPECT_EQ(got.rows, wanted.rows);
}

TEST_F(StatisticsIo, EveryPartRoundTripsToTheBit) {
  const Statistics wanted = sample();
  save_statistics(path_, kSum, wanted);
  const Statistics got = load_statistics(path_, kSum);
  ASSERT_EQ(got.size(), wanted.size());
  for (const auto& [name, own] : wanted) {
    SCOPED_TRACE(name);
    const LayerStatistics& other = got.at(name);
    EXPECT_TRUE(is_same(other.norms.norms(), own.norms.norms()));
    EXPECT_TRUE(is_same(other.norms.count(), own.norms.count()));
    expect_same_fit(other.fit, own.fit);
    ASSERT_EQ(other.sums.has_value(), own.sums.has_value());
    if (own.sums) expect_same_sums(*other.sums, *own.sums);
  }
}

TEST_F(StatisticsIo, AFitOfEitherPrecisionRoundTrips) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    Statistics statistics;
    statistics["q"].fit = full_fit(dtype);
    save_statistics(path_, kSum, statistics);
    expect_same_fit(load_statistics(path_, kSum).at("q").fit, statistics["q"].fit);
  }
}

TEST_F(StatisticsIo, ACovarianceThatLayersShareIsStoredOnce) {
  save_statistics(path_, kSum, sample());
  size_t count = 0;
  for (const auto& [key, tensor] : load_tensors(path_).tensors)
    count += key.size() > 3 && key.substr(key.size() - 3) == ".xx" ? 1 : 0;
  EXPECT_EQ(count, 1U);
  const Statistics got = load_statistics(path_, kSum);
  EXPECT_EQ(got.at("l.0.q").sums->xx.const_data_ptr(), got.at("l.0.k").sums->xx.const_data_ptr());
  Statistics apart = sample();
  apart["l.0.q"].sums->xx = random({6, 6}, 99);
  save_statistics(path_, kSum, apart);
  const Statistics two = load_statistics(path_, kSum);
  EXPECT_TRUE(is_same(two.at("l.0.q").sums->xx, random({6, 6}, 99)));
  EXPECT_TRUE(is_same(two.at("l.0.k").sums->xx, random({6, 6}, 20)));
}

TEST_F(StatisticsIo, NoLayersAndNamesWithDotsAndQuotesRoundTrip) {
  save_statistics(path_, kSum, {});
  EXPECT_TRUE(load_statistics(path_, kSum).empty());
  Statistics odd;
  odd["a.fit"].fit.A = random({2, 2}, 1);
  odd["a.fit"].sums = sums_of(random({6, 6}, 2), 3);
  odd["a \"b\".\xc3\xa9"].sums = odd["a.fit"].sums;
  save_statistics(path_, kSum, odd);
  const Statistics got = load_statistics(path_, kSum);
  ASSERT_EQ(got.size(), 2U);
  EXPECT_TRUE(is_same(got.at("a.fit").fit.A, odd["a.fit"].fit.A));
  expect_same_sums(*got.at("a \"b\".\xc3\xa9").sums, *odd["a.fit"].sums);
}

TEST_F(StatisticsIo, SumsOfAFileAreSolvedAgain) {
  const Tensor A = random({3, 6}, 1);
  const Tensor x = random({30, 6}, 2);
  const Tensor v = random({30, 3}, 3);
  Statistics statistics;
  statistics["q"].sums = FitSums{
      at::mm(x.t(), x), at::mm(v.t(), x), x.sum(0), v.sum(0), v.pow(2).sum().item<double>(), 30};
  save_statistics(path_, kSum, statistics);
  const Statistics got = load_statistics(path_, kSum);
  EXPECT_TRUE(at::equal(solve_fit(*got.at("q").sums, A, {}, "q").A,
                        solve_fit(*statistics["q"].sums, A, {}, "q").A));
}

// ---- refusals

TEST_F(StatisticsIo, RefusesStatisticsOfAnotherAdapter) {
  save_statistics(path_, kSum, sample());
  EXPECT_TRUE(refuses([&] { load_statistics(path_, "0123abce"); }, "got those of another one"));
  EXPECT_TRUE(refuses([&] { load_statistics(path_, ""); }, path_));
}

TEST_F(StatisticsIo, RefusesOtherFormats) {
  const auto refuses_metadata = [&](const std::string& key, const char* value,
                                    const std::string& part) {
    return refuses_file(
        sample(),
        [&](TensorFile& file) {
          file.metadata.erase(key);
          if (value) file.metadata[key] = value;
        },
        part);
  };
  EXPECT_TRUE(refuses_metadata("reslora.statistics", "4", "of format 1 or 2 or 3; got '4'"));
  EXPECT_TRUE(refuses_metadata("reslora.statistics", "", "of format 1 or 2 or 3"));
  EXPECT_TRUE(refuses_metadata("reslora.statistics", nullptr, "is no file of statistics"));
  EXPECT_TRUE(refuses_metadata("reslora.adapter_sum", nullptr, "must have reslora.adapter_sum"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", nullptr, "must have reslora.shared_xx"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", "{", "reslora.shared_xx"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", "[]", "reslora.shared_xx"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", R"({"l.0.q": 3})", "reslora.shared_xx"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", "{}", "known tensors only"));
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", R"({"l.0.q": "l.9.q"})", "'l.9.q.xx'"));
  const char* ghost = R"({"l.0.q": "l.0.k", "l.0.k": "l.0.k", "ghost": "l.0.k"})";
  EXPECT_TRUE(refuses_metadata("reslora.shared_xx", ghost, "ghost"));
}

TEST_F(StatisticsIo, RefusesShapesThatDoNotFit) {
  const auto refuses_tensor = [&](const std::string& key, const Tensor& tensor) {
    return refuses_file(
        sample(), [&](TensorFile& file) { file.tensors.at(key) = tensor; }, key.substr(6));
  };
  EXPECT_TRUE(refuses_tensor("l.0.q.norms", at::ones({3, 5})));
  EXPECT_TRUE(refuses_tensor("l.0.q.norms", at::ones({2, 5}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.norm_count", at::ones({2}, at::kLong)));
  EXPECT_TRUE(refuses_tensor("l.0.q.norm_count", at::ones({1})));
  EXPECT_TRUE(refuses_tensor("l.0.q.fit_A", at::ones({3}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.fit_A", at::ones({3, 6}, at::kLong)));
  EXPECT_TRUE(refuses_tensor("l.0.q.fit_B", at::ones({4, 2}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.affine_A", at::ones({3, 5}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.offset", at::ones({3})));
  EXPECT_TRUE(refuses_tensor("l.0.q.fit", at::ones({4}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.fit", at::ones({5})));
  EXPECT_TRUE(refuses_tensor("l.0.k.xx", at::ones({6, 5}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.k.xx", at::ones({6, 6})));
  EXPECT_TRUE(refuses_tensor("l.0.q.vx", at::ones({3, 5}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.x_sum", at::ones({5}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.v_sum", at::ones({2}, at::kDouble)));
  EXPECT_TRUE(refuses_tensor("l.0.q.sums", at::ones({3}, at::kDouble)));
}

TEST_F(StatisticsIo, RefusesMissingAndUnknownTensors) {
  for (const char* key : {"norm_count", "fit", "affine_A", "vx", "x_sum", "v_sum", "sums"}) {
    const std::string name = std::string("l.0.q.") + key;
    EXPECT_TRUE(refuses_file(
        sample(), [&](TensorFile& file) { file.tensors.erase(name); }, name));
  }
  for (const char* key : {"fit_A", "offset", "norms"}) {  // what is left of the part is unknown
    EXPECT_TRUE(refuses_file(
        sample(), [&](TensorFile& file) { file.tensors.erase(std::string("l.0.q.") + key); },
        "known tensors only; got 'l.0.q."));
  }
  EXPECT_TRUE(refuses_file(
      sample(), [](TensorFile& file) { file.tensors["l.0.q.more"] = at::ones({1}); },
      "got 'l.0.q.more'"));
  EXPECT_TRUE(refuses_file(
      sample(), [](TensorFile& file) { file.tensors["stray"] = at::ones({1}); }, "got 'stray'"));
}

TEST_F(StatisticsIo, RefusesNumbersThatAreNotFinite) {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (int64_t i = 0; i < 5; ++i) {
      EXPECT_TRUE(refuses_file(
          sample(), [&](TensorFile& file) { file.tensors.at("l.0.q.fit")[i] = bad; },
          "the numbers of 'l.0.q.fit' must be finite"));
    }
    for (int64_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(refuses_file(
          sample(), [&](TensorFile& file) { file.tensors.at("l.0.k.sums")[i] = bad; },
          "the numbers of 'l.0.k.sums' must be finite"));
    }
  }
}

TEST_F(StatisticsIo, RefusesCountsThatAreNone) {
  for (const double bad : {-1.0, 2.5, 1e300}) {
    for (const int64_t i : {3, 4}) {  // rows and steps
      EXPECT_TRUE(refuses_file(
          sample(), [&](TensorFile& file) { file.tensors.at("l.0.q.fit")[i] = bad; }, "l.0.q.fit"))
          << bad;
    }
    EXPECT_TRUE(refuses_file(
        sample(), [&](TensorFile& file) { file.tensors.at("l.0.k.sums")[1] = bad; }, "l.0.k.sums"))
        << bad;
  }
}

TEST_F(StatisticsIo, WritesFitsInOneDtypeAndAffineFormsWhole) {
  Statistics odd;
  odd["half"].fit.A = random({3, 6}, 1).to(at::kHalf);
  odd["mixed"].fit = full_fit(at::kDouble);
  odd["mixed"].fit.B = odd["mixed"].fit.B.to(at::kFloat);
  odd["no_offset"].fit = full_fit(at::kDouble);
  odd["no_offset"].fit.offset = Tensor();
  save_statistics(path_, kSum, odd);
  const Statistics read = load_statistics(path_, kSum);
  EXPECT_TRUE(at::equal(read.at("half").fit.A, odd["half"].fit.A.to(at::kFloat)));
  EXPECT_TRUE(at::equal(read.at("mixed").fit.B, odd["mixed"].fit.B.to(at::kDouble)));
  EXPECT_FALSE(read.at("no_offset").fit.affine_A.defined());
}

TEST_F(StatisticsIo, RefusesSumsWithoutCovariance) {
  Statistics no_xx;
  no_xx["q"].sums = sums_of(Tensor(), 1);
  EXPECT_TRUE(refuses([&] { save_statistics(path_, kSum, no_xx); }, "(layer q)"));
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

}  // namespace
}  // namespace reslora
