// Each kernel on the CPU: its result against fp64, its tails, its order, its traffic.
#include "cuda/dropout.cuh"
#include "harness.h"

namespace kernel_tests {
namespace {

using namespace reslora::cuda;

constexpr double kForward = 2.0, kGradient = 3.0;  // times the plain path's error

class OnCpu : public testing::TestWithParam<Case> {
 protected:
  ~OnCpu() override {
    cuda_on_cpu::options() = {};
    cuda_on_cpu::stop_watching();
  }
  Buffer wide(int64_t rows) {
    const Shape& s = GetParam().shape;
    Buffer b(rows, s.n, GetParam().type, s.gap, s.shift);
    b.fill(random_);
    return b;
  }
  Buffer thin(int64_t rows) {
    Buffer b(rows, GetParam().shape.R, GetParam().type);
    b.fill(random_);
    return b;
  }
  Buffer thin_result(int64_t rows) {
    return {rows, GetParam().shape.R, GetParam().type, GetParam().shape.gap};
  }

  std::mt19937 random_{7};
};

// ---- project

using Project = OnCpu;

void check_project(const Case& c, Dropout dropout, std::mt19937& random) {
  const Shape& s = c.shape;
  Buffer x(s.T, s.n, c.type, s.gap, s.shift), A(s.R, s.n, c.type), u(s.T, s.R, c.type, s.gap);
  x.fill(random), A.fill(random);
  Bits bits(s.T, s.n);
  if (dropout == Dropout::kGiven) bits.fill(random);
  const Mask mask{dropout, bits.bytes.get(), 49152, {11, 8}};
  const double squares =
      run(ProjectArgs{c.type, x, A, u, 1.25f, mask, nullptr, {}, s.multiprocessors});
  const Exact dropped = dropout == Dropout::kNone ? exact(x) : kept(exact(x), bits);
  expect_near(u, product(dropped, transposed(exact(A)), 1.25, c.type), kForward);
  double sum = 0;
  for (double v : exact(x).values) sum += v * v;
  EXPECT_NEAR(squares, sum, 1e-5 * sum);
}

TEST_P(Project, EqualsTheProduct) { check_project(GetParam(), Dropout::kNone, random_); }

TEST_P(Project, AppliesGivenBits) {
  const Shape& s = GetParam().shape;
  if (!is_full() && s.T % 2 == 0 && s.R != 8) return;  // about half of the shapes in the short run
  check_project(GetParam(), Dropout::kGiven, random_);
}

TEST_P(Project, AppliesTheBitsThatItDraws) {
  if (!is_full() && GetParam().shape.T % 2 == 1 && GetParam().shape.R != 9) return;
  check_project(GetParam(), Dropout::kDrawn, random_);
}

// ---- expand_grad

using ExpandGrad = OnCpu;

TEST_P(ExpandGrad, GivesBothGradients) {
  const auto [type, s] = GetParam();
  if (s.R > kMaxExpandGradRank) return;
  Buffer gy = wide(s.T), B = thin(s.n), entered = thin(s.T);
  Buffer ds = thin_result(s.T), dB = thin_result(s.n);
  run(ExpandGradArgs{type, gy, B, entered, {}, {}, s.multiprocessors}, ds, dB, 0.75f);
  expect_near(ds, product(exact(gy), exact(B), 0.75, type), kGradient);
  expect_near(dB, product(transposed(exact(gy)), exact(entered), 0.75, type), kGradient);
}

// ---- project_grad

using ProjectGrad = OnCpu;

TEST_P(ProjectGrad, EqualsTheProductWithKeptX) {
  const auto [type, s] = GetParam();
  Buffer x = wide(s.T), du = thin(s.T), dA(s.R, s.n, type, s.gap, s.shift);
  Bits bits(s.T, s.n);
  bits.fill(random_);
  const bool has_bits = s.R % 4 != 1 || s.T == 37;
  const uint8_t* given = has_bits ? bits.bytes.get() : nullptr;
  run(ProjectGradArgs{type, du, x, {}, given, s.multiprocessors}, dA, 1.5f);
  const Exact dropped = has_bits ? kept(exact(x), bits) : exact(x);
  expect_near(dA, product(transposed(exact(du)), dropped, 1.5, type), kGradient);
}

// ---- expand

using Expand = OnCpu;

enum class Base { kNone, kRow, kFull };

void check_expand(const Case& c, Base kind, bool has_bits, std::mt19937& random) {
  const Shape& s = c.shape;
  Buffer u(s.T, s.R, c.type), P(s.R, s.n, c.type, s.gap, s.shift);
  Buffer out(s.T, s.n, c.type, s.gap, s.shift), base(kind == Base::kRow ? 1 : s.T, s.n, c.type);
  u.fill(random), P.fill(random), base.fill(random, 4.0f);
  Bits bits(s.T, s.n);
  bits.fill(random);
  ConstMatrix below = base;
  if (kind == Base::kRow) below.rows = s.T, below.stride = 0;
  if (kind == Base::kNone) below.data = nullptr;
  ASSERT_EQ(launch_expand({c.type, u, P, out, below, 2.5f, has_bits ? bits.bytes.get() : nullptr},
                          nullptr),
            cudaSuccess);
  Exact added(s.T, s.n);
  for (int64_t i = 0; i < s.T && kind != Base::kNone; ++i)
    for (int64_t j = 0; j < s.n; ++j) added.at(i, j) = base.value(kind == Base::kRow ? 0 : i, j);
  Reference want = product(exact(u), exact(P), 2.5, c.type, &added);
  if (has_bits) want = {kept(want.exact, bits), kept(want.plain, bits)};
  expect_near(out, want, kForward);
}

TEST_P(Expand, MasksTheProduct) { check_expand(GetParam(), Base::kNone, true, random_); }

TEST_P(Expand, AddsABase) {
  const Base kind = GetParam().shape.T % 2 ? Base::kRow : Base::kFull;
  check_expand(GetParam(), kind, GetParam().shape.R % 2 == 0, random_);
}

INSTANTIATE_TEST_SUITE_P(Shapes, Project, testing::ValuesIn(cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Shapes, ExpandGrad, testing::ValuesIn(cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Shapes, ProjectGrad, testing::ValuesIn(cases()), name_of);
INSTANTIATE_TEST_SUITE_P(Shapes, Expand, testing::ValuesIn(cases()), name_of);

// ---- Order: equal inputs give equal bits, whatever block runs first

/// Every result of every kernel, as bits.
std::vector<std::vector<uint16_t>> all_results() {
  constexpr int64_t T = 260, n = 1100, R = 9;  // every kernel adds parts up
  constexpr Type type = Type::kBFloat16;
  std::mt19937 random{3};
  Buffer x(T, n, type), A(R, n, type), B(n, R, type), s(T, R, type);
  x.fill(random), A.fill(random), B.fill(random), s.fill(random);
  Buffer u(T, R, type), ds(T, R, type), dB(n, R, type), dA(R, n, type), out(T, n, type);
  Bits bits(T, n);
  const Mask mask{Dropout::kDrawn, bits.bytes.get(), 40000, {5, 4}};
  const double squares = run(ProjectArgs{type, x, A, u, 1.0f, mask, nullptr, {}, 8});
  run(ExpandGradArgs{type, x, B, s, {}, {}, 8}, ds, dB, 1.0f);
  run(ProjectGradArgs{type, s, x, {}, bits.bytes.get(), 16}, dA, 1.0f);
  EXPECT_EQ(launch_expand({type, s, A, out, {}, 1.0f, bits.bytes.get()}, nullptr), cudaSuccess);
  std::vector<uint16_t> others(bits.bytes.get(), bits.bytes.get() + bits.count);
  uint16_t of_squares[4];
  std::memcpy(of_squares, &squares, sizeof squares);
  others.insert(others.end(), of_squares, of_squares + 4);
  return {u.content(), ds.content(), dB.content(), dA.content(), out.content(), others};
}

TEST(Kernels, GiveEqualBitsInAnyOrderOfBlocks) {
  const auto once = all_results();
  EXPECT_EQ(all_results(), once);
  cuda_on_cpu::options().is_order_reversed = true;
  EXPECT_EQ(all_results(), once);
  cuda_on_cpu::options() = {};
}

// ---- Dropout bits

TEST(Philox, GivesThePublishedNumbers) {
  const auto words = [](uint4 v) { return std::vector<uint32_t>{v.x, v.y, v.z, v.w}; };
  constexpr uint32_t kOnes = 0xffffffffu;
  EXPECT_EQ(words(philox4x32({0, 0, 0, 0}, {0, 0})),
            (std::vector<uint32_t>{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(words(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes})),
            (std::vector<uint32_t>{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
}

Bits draw(int64_t T, int64_t n, uint32_t level, const Philox& philox) {
  std::mt19937 random{1};
  Buffer x(T, n, Type::kHalf), A(4, n, Type::kHalf), u(T, 4, Type::kHalf);
  x.fill(random), A.fill(random);
  Bits bits(T, n);
  const Mask mask{Dropout::kDrawn, bits.bytes.get(), level, philox};
  run(ProjectArgs{Type::kHalf, x, A, u, 1.0f, mask, nullptr, {}, 1});
  return bits;
}

std::vector<uint8_t> bytes_of(const Bits& bits) {
  return {bits.bytes.get(), bits.bytes.get() + bits.count};
}

TEST(DrawnBits, AreThoseOfSeedOffsetAndPlace) {
  const uint64_t seed = 0x123456789abcull, offset = 0x8'0000'0008ull;
  const Bits bits = draw(3, 20, 30000, {seed, offset});
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t j = 0; j < 20; ++j) {
      const auto place = static_cast<uint32_t>(i * 3 + j / 8);
      const uint4 random = philox4x32({2, 2, place, 0}, {0x56789abcu, 0x1234u});  // offset / 4
      const uint32_t words[] = {random.x, random.y, random.z, random.w};
      const uint32_t number = words[j % 8 / 2] >> (j % 2 * 16) & 0xffff;
      EXPECT_EQ(bits.keeps(i, j), number < 30000) << i << " " << j;
    }
  }
}

TEST(DrawnBits, AreKeptBelowTheLevelAndNotAtIt) {
  const uint4 random = philox4x32({0, 0, 0, 0}, {5, 0});
  const uint32_t words[] = {random.x, random.y, random.z, random.w};
  for (int64_t j = 0; j < 8; ++j) {
    const uint32_t number = words[j / 2] >> (j % 2 * 16) & 0xffff;
    EXPECT_FALSE(draw(1, 8, number, {5, 0}).keeps(0, j)) << j;
    EXPECT_TRUE(draw(1, 8, number + 1, {5, 0}).keeps(0, j)) << j;
  }
}

TEST(DrawnBits, AreTheSameFromDeviceMemory) {
  const int64_t seed = 77, offset = 40;
  const auto want = bytes_of(draw(9, 70, 50000, {77, 48}));
  EXPECT_EQ(bytes_of(draw(9, 70, 50000, {0, 8, &seed, &offset})), want);
  EXPECT_NE(bytes_of(draw(9, 70, 50000, {77, 52})), want);
  EXPECT_NE(bytes_of(draw(9, 70, 50000, {78, 48})), want);
}

TEST(DrawnBits, AreKeptAsOftenAsAsked) {
  for (const uint32_t level : {1u, 6554u, 62259u, 65536u}) {
    const Bits bits = draw(64, 1024, level, {9, 0});
    double count = 0;
    for (int64_t i = 0; i < 64; ++i)
      for (int64_t j = 0; j < 1024; ++j) count += bits.keeps(i, j);
    const double p = level / 65536.0;
    EXPECT_NEAR(count / 65536, p, 5 * std::sqrt(p * (1 - p) / 65536) + 1e-9) << level;
  }
}

// ---- Refusals

TEST(Kernels, RefuseARankBeyondTheirTiles) {
  Buffer x(2, 8, Type::kHalf), A(129, 8, Type::kHalf), u(2, 129, Type::kHalf);
  const ProjectArgs args{Type::kHalf, x, A, u, 1.0f, {}, nullptr, {}, 1};
  EXPECT_EQ(launch_project(args, nullptr), cudaErrorInvalidValue);
}

TEST(Kernels, RefuseToReadGyForRanksThatCostMoreThanThatSaves) {
  Buffer gy(2, 8, Type::kHalf), B(8, 33, Type::kHalf), s(2, 33, Type::kHalf);
  const ExpandGradArgs args{Type::kHalf, gy, B, s, {}, {}, 1};
  EXPECT_EQ(launch_expand_grad(args, nullptr), cudaErrorInvalidValue);
}

TEST(Kernels, RefuseToCutColumnsIntoRangesWithoutRoomForTheirParts) {
  Buffer x(2, 1100, Type::kHalf), A(8, 1100, Type::kHalf), u(2, 8, Type::kHalf);
  ProjectArgs args{Type::kHalf, x, A, u, 1.0f, {}, nullptr, {}, 8};
  ASSERT_GT(cut_of(args).ranges, 1);
  EXPECT_EQ(launch_project(args, nullptr), cudaErrorInvalidValue);
}

TEST(Kernels, ReturnTheErrorOfALaunch) {
  cuda_on_cpu::options().failure = cudaErrorNoKernelImageForDevice;
  Buffer u(2, 8, Type::kHalf), P(8, 8, Type::kHalf), out(2, 8, Type::kHalf);
  EXPECT_EQ(launch_expand({Type::kHalf, u, P, out, {}, 1.0f, nullptr}, nullptr),
            cudaErrorNoKernelImageForDevice);
  cuda_on_cpu::options() = {};
}

TEST(Kernels, ReturnZerosForNoRows) {
  Buffer x(0, 40, Type::kHalf), A(8, 40, Type::kHalf), u(0, 8, Type::kHalf), dA(8, 40, Type::kHalf);
  Buffer B(40, 8, Type::kHalf), dB(40, 8, Type::kHalf);
  std::mt19937 random{1};
  A.fill(random), B.fill(random);
  EXPECT_EQ(run(ProjectArgs{Type::kHalf, x, A, u, 1.0f, {}, nullptr, {}, 132}), 0.0);
  run(ProjectGradArgs{Type::kHalf, u, x, {}, nullptr, 132}, dA, 1.0f);
  run(ExpandGradArgs{Type::kHalf, x, B, u, {}, {}, 132}, u, dB, 1.0f);
  EXPECT_EQ(largest(exact(dA)), 0.0);
  EXPECT_EQ(largest(exact(dB)), 0.0);
}

}  // namespace
}  // namespace kernel_tests
