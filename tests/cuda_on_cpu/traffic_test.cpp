// Bytes that each kernel reads and writes, against the budget: one pass over the wide matrix.
//
// Wide matrices are counted each time that they are read, small ones (A, B, u, s) once, since they
// stay in the cache. What blocks leave for each other is counted apart, against its own formula.
#include "harness.h"

namespace kernel_tests {
namespace {

using namespace reslora::cuda;

constexpr int64_t kT = 256, kN = 1024, kR = 16;
constexpr Type kType = Type::kBFloat16;

/// Expects a count within 10 % of the budget, and prints both.
void expect_budget(const std::string& what, double got, double budget) {
  std::printf("  %-28s %10.0f bytes, budget %10.0f (%.2f)\n", what.c_str(), got, budget,
              got / budget);
  EXPECT_NEAR(got / budget, 1.0, 0.1) << what;
}

class TrafficOf : public testing::Test {
 protected:
  TrafficOf() {
    watch("wide", wide_), watch("rows", rows_), watch("columns", columns_), watch("thin", thin_);
    watch("thin out", thin_out_), watch("rows out", rows_out_), watch("columns out", columns_out_);
    watch("wide out", wide_out_);
    cuda_on_cpu::watch("bits", bits_.bytes.get(), static_cast<size_t>(bits_.count));
  }
  ~TrafficOf() override { cuda_on_cpu::stop_watching(); }

  void watch(const std::string& name, Buffer& buffer) {
    std::mt19937 random{5};
    buffer.fill(random);
    cuda_on_cpu::watch(name, buffer.data(), buffer.bytes());
  }
  static double read(const std::string& name) {
    return static_cast<double>(cuda_on_cpu::traffic_of(name).read);
  }
  static double read_once(const std::string& name) {
    return static_cast<double>(cuda_on_cpu::traffic_of(name).read_once);
  }
  static double written(const std::string& name) {
    return static_cast<double>(cuda_on_cpu::traffic_of(name).written);
  }
  static void watch(const std::string& name, Sum& sum) {
    cuda_on_cpu::watch(name, sum.data(), sum.bytes());
  }
  static double traffic(const std::string& name) { return read(name) + written(name); }

  static constexpr double kX = 2.0 * kT * kN, kA = 2.0 * kR * kN, kU = 2.0 * kT * kR;
  Buffer wide_{kT, kN, kType}, rows_{kR, kN, kType}, columns_{kN, kR, kType}, thin_{kT, kR, kType};
  Buffer wide_out_{kT, kN, kType}, rows_out_{kR, kN, kType}, columns_out_{kN, kR, kType};
  Buffer thin_out_{kT, kR, kType};
  Bits bits_{kT, kN};
};

TEST_F(TrafficOf, Project) {
  const Mask mask{Dropout::kDrawn, bits_.bytes.get(), 60000, {1, 0}};
  ProjectArgs args{kType, wide_, rows_, thin_out_, 1.0f, mask, nullptr, {}, 1};
  ASSERT_EQ(cut_of(args).ranges, 1);
  Sum squares(cut_of(args).tiles, 1, 1);
  args.squares = squares.data();
  watch("squares", squares);
  ASSERT_EQ(launch_project(args, nullptr), cudaSuccess);
  expect_budget("project: x", read("wide"), kX);
  expect_budget("project: bits written", written("bits"), kX / 16);
  expect_budget(
      "project: all",
      read("wide") + read_once("rows") + written("thin out") + written("bits") + written("squares"),
      kX + kA + kU + kX / 16);
}

TEST_F(TrafficOf, ExpandGrad) {
  ExpandGradArgs args{kType, wide_, columns_, thin_, {}, {}, 1};
  const Cut cut = cut_of(args);
  Sum ds(cut.tiles, kT, kR), dB(cut.ranges, kN, kR);
  watch("parts of ds", ds), watch("parts of dB", dB);
  args.ds = ds.parts(), args.dB = dB.parts();
  ASSERT_EQ(launch_expand_grad(args, nullptr), cudaSuccess);
  ds.add_up(thin_out_, kType, 1.0f), dB.add_up(columns_out_, kType, 1.0f);
  expect_budget("expand_grad: gy", read("wide"), kX);
  expect_budget("expand_grad: all but sums",
                read("wide") + read_once("columns") + read_once("thin") + written("thin out") +
                    written("columns out"),
                kX + 2 * kA + 2 * kU);
  // ds for each 512 columns and dB once, in fp32, written and read.
  expect_budget("expand_grad: sums", traffic("parts of ds") + traffic("parts of dB"),
                2 * (kN / 512 * 2 * kU + 2 * kA));
}

TEST_F(TrafficOf, ProjectGrad) {
  ProjectGradArgs args{kType, thin_, wide_, {}, bits_.bytes.get(), 1};
  Sum dA(cut_of(args).ranges, kR, kN);
  watch("parts of dA", dA);
  args.dA = dA.parts();
  ASSERT_EQ(launch_project_grad(args, nullptr), cudaSuccess);
  dA.add_up(rows_out_, kType, 1.0f);
  expect_budget("project_grad: x", read("wide"), kX);
  expect_budget("project_grad: bits", read("bits"), kX / 16);
  expect_budget("project_grad: all but sums",
                read("wide") + read("bits") + read_once("thin") + written("rows out"),
                kX + kX / 16 + kU + kA);
  expect_budget("project_grad: sums", traffic("parts of dA"), 2 * 2 * kA);
}

TEST_F(TrafficOf, Expand) {
  ASSERT_EQ(launch_expand({kType, thin_, rows_, wide_out_, {}, 1.0f, bits_.bytes.get()}, nullptr),
            cudaSuccess);
  expect_budget("expand: out", written("wide out"), kX);
  expect_budget("expand: all",
                written("wide out") + read("bits") + read_once("thin") + read_once("rows"),
                kX + kX / 16 + kU + kA);
}

}  // namespace
}  // namespace kernel_tests
