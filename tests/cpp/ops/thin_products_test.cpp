// The products beside the big GEMM: every instruction set of this processor against sums in fp64.
#include "cpu/thin_products.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace reslora::thin {
namespace {

struct Sizes {
  int64_t rows, columns, r;
  bool has_bits;
  int64_t padding;  // floats between the rows of the wide matrix
};

/// A wide matrix with bits, two thin ones and a base, all random.
struct Problem {
  explicit Problem(const Sizes& s)
      : sizes(s),
        stride(s.columns + s.padding),
        x(random(s.rows * stride)),
        p(random(s.r * s.columns)),
        u(random(s.rows * s.r)),
        base(random(s.rows * s.columns)),
        bit_stride((s.columns + 7) / 8) {
    std::mt19937 generator(7);
    for (int64_t i = 0; i < s.rows * bit_stride; ++i)
      bits.push_back(static_cast<uint8_t>(generator()));
    // A dropped element must not matter, whatever it is.
    if (s.has_bits && s.rows > 0 && s.columns > 0) {
      bits[0] &= 0xFE;
      x[0] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  static std::vector<float> random(int64_t n) {
    static std::mt19937 generator(3);
    std::vector<float> values;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < n; ++i) values.push_back(normal(generator));
    return values;
  }

  Tile tile() {
    return {x.data(),   stride,     sizes.has_bits ? bits.data() : nullptr,
            bit_stride, sizes.rows, sizes.columns};
  }
  bool is_kept(int64_t i, int64_t j) const {
    return !sizes.has_bits || ((bits[i * bit_stride + j / 8] >> (j % 8)) & 1);
  }
  double kept(int64_t i, int64_t j) const { return is_kept(i, j) ? x[i * stride + j] : 0.0; }
  Rows rows_of(const std::vector<float>& m, int64_t width) const { return {m.data(), width}; }

  double dot(int64_t i, int64_t k) const {
    double sum = 0;
    for (int64_t j = 0; j < sizes.columns; ++j) sum += kept(i, j) * p[k * sizes.columns + j];
    return sum;
  }
  double reduced(int64_t k, int64_t j) const {
    double sum = 0;
    for (int64_t i = 0; i < sizes.rows; ++i) sum += u[i * sizes.r + k] * kept(i, j);
    return sum;
  }
  double expanded(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t k = 0; k < sizes.r; ++k)
      sum += static_cast<double>(u[i * sizes.r + k]) * p[k * sizes.columns + j];
    return sum;
  }

  Sizes sizes;
  int64_t stride;
  std::vector<float> x, p, u, base;
  int64_t bit_stride;
  std::vector<uint8_t> bits;
};

constexpr double kTolerance = 2e-4;  // sums of at most 2,100 products of normal numbers

class Products : public testing::TestWithParam<Sizes> {};

TEST_P(Products, ProjectAddsDotProducts) {
  Problem a(GetParam());
  const auto [T, n, r, has_bits, padding] = GetParam();
  for (const Kernels* kernels : supported_kernels()) {
    std::vector<float> u(T * r, 1.0f);
    kernels->project(a.tile(), a.rows_of(a.p, n), r, u.data(), r);
    for (int64_t i = 0; i < T; ++i)
      for (int64_t k = 0; k < r; ++k) ASSERT_NEAR(u[i * r + k], 1 + a.dot(i, k), kTolerance);
  }
}

TEST_P(Products, ExpandWritesTheRowsAndNothingBesideThem) {
  Problem a(GetParam());
  const auto [T, n, r, has_bits, padding] = GetParam();
  for (const Kernels* kernels : supported_kernels()) {
    for (const int64_t base_stride : {int64_t{-1}, int64_t{0}, n}) {
      std::fill(a.x.begin(), a.x.end(), -7.0f);
      const Rows base = {base_stride < 0 ? nullptr : a.base.data(), base_stride};
      kernels->expand(a.tile(), a.rows_of(a.u, r), a.rows_of(a.p, n), r, base);
      for (int64_t i = 0; i < T; ++i)
        for (int64_t j = 0; j < a.stride; ++j) {
          double wanted = -7;
          if (j < n) {
            const double start = base.data ? base.data[i * base_stride + j] : 0.0;
            wanted = a.is_kept(i, j) ? start + a.expanded(i, j) : 0.0;
          }
          ASSERT_NEAR(a.x[i * a.stride + j], wanted, kTolerance) << i << ", " << j;
        }
    }
  }
}

TEST_P(Products, ReduceAddsOuterProducts) {
  Problem a(GetParam());
  const auto [T, n, r, has_bits, padding] = GetParam();
  for (const Kernels* kernels : supported_kernels()) {
    std::vector<float> q(r * n, 1.0f);
    kernels->reduce(a.tile(), a.rows_of(a.u, r), r, q.data(), n);
    for (int64_t k = 0; k < r; ++k)
      for (int64_t j = 0; j < n; ++j) ASSERT_NEAR(q[k * n + j], 1 + a.reduced(k, j), kTolerance);
  }
}

TEST_P(Products, ThreadedProductsEqualTheLiteralSums) {
  Problem a(GetParam());
  const auto [T, n, r, has_bits, padding] = GetParam();
  std::vector<float> u(T * r, 9.0f), q(r * n, 9.0f), again(T * r, 9.0f), alone(r * n, 9.0f);
  project(a.tile(), a.rows_of(a.p, n), r, u.data(), nullptr);
  reduce(a.tile(), a.rows_of(a.u, r), r, alone.data());
  project_and_reduce(a.tile(), a.rows_of(a.p, n), a.rows_of(a.u, r), r, again.data(), q.data());
  for (int64_t i = 0; i < T; ++i)
    for (int64_t k = 0; k < r; ++k) ASSERT_NEAR(u[i * r + k], a.dot(i, k), kTolerance);
  for (int64_t k = 0; k < r; ++k)
    for (int64_t j = 0; j < n; ++j) ASSERT_NEAR(q[k * n + j], a.reduced(k, j), kTolerance);
  EXPECT_EQ(u, again);
  EXPECT_EQ(q, alone);
}

std::string name_of(const testing::TestParamInfo<Sizes>& info) {
  const Sizes& s = info.param;
  return std::to_string(s.rows) + "x" + std::to_string(s.columns) + "r" + std::to_string(s.r) +
         (s.has_bits ? "bits" : "") + (s.padding ? "padded" : "");
}

std::vector<Sizes> all_sizes() {
  std::vector<Sizes> sizes;
  for (const bool has_bits : {false, true}) {
    for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 8}, {1, 1}, {1, 40}, {7, 3}, {6, 16}, {9, 17}, {13, 100}, {50, 1030}, {97, 65}})
      for (const int64_t r : {1, 4, 9, 16})
        sizes.push_back({rows, columns, r, has_bits, rows == 13 ? 5 : 0});
    sizes.push_back({2100, 24, 40, has_bits, 0});  // long sums, several threads
  }
  return sizes;
}

INSTANTIATE_TEST_SUITE_P(Sizes, Products, testing::ValuesIn(all_sizes()), name_of);

TEST(Thin, SumOfSquaresOfBfloat16EqualsThatInDouble) {
  for (const int64_t columns : {1, 3, 16, 63, 64, 65, 200}) {
    const int64_t rows = 17, stride = columns + 2;
    std::vector<uint16_t> x(rows * stride, 0x7FC0);  // NaN where nothing may be read
    double wanted = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const float value = static_cast<float>((i * 31 + j * 17) % 37 - 18) / 4;  // exact in bf16
        uint32_t bits = 0;
        std::memcpy(&bits, &value, sizeof(bits));
        x[i * stride + j] = static_cast<uint16_t>(bits >> 16);
        wanted += static_cast<double>(value) * value;
      }
    for (const Kernels* kernels : supported_kernels())
      EXPECT_NEAR(kernels->sum_of_squares_bf16(x.data(), stride, rows, columns), wanted,
                  1e-6 * wanted);
    EXPECT_NEAR(sum_of_squares_bf16(x.data(), stride, rows, columns), wanted, 1e-6 * wanted);
    EXPECT_EQ(sum_of_squares_bf16(x.data(), stride, 0, columns), 0);
  }
}

TEST(Thin, SumOfSquaresCountsDroppedElements) {
  Problem a({13, 100, 1, false, 5});
  double wanted = 0;
  for (int64_t i = 0; i < 13; ++i)
    for (int64_t j = 0; j < 100; ++j) wanted += std::pow(a.x[i * a.stride + j], 2);
  for (const Kernels* kernels : supported_kernels())
    EXPECT_NEAR(kernels->sum_of_squares(a.tile()), wanted, 1e-3);
  double squares = 0;
  std::vector<float> u(13);
  project(a.tile(), a.rows_of(a.p, 100), 1, u.data(), &squares);
  EXPECT_NEAR(squares, wanted, 1e-3);
}

TEST(Thin, LongSumsAreAddedInParts) {
  // 300,000 times 1 + 2^-12: a running fp32 sum rounds every step, by up to 2^-7 at the end.
  const int64_t rows = 300000, columns = 2;
  std::vector<float> x(rows * columns, 1.0f + 1.0f / 4096), u(rows, 1.0f), p(columns);
  reduce({x.data(), columns, nullptr, 0, rows, columns}, {u.data(), 1}, 1, p.data());
  const double wanted = rows * (1.0 + 1.0 / 4096);
  EXPECT_NEAR(p[0] / wanted, 1.0, 1e-6);
  EXPECT_NEAR(p[1] / wanted, 1.0, 1e-6);
}

TEST(Thin, TransposesEverySize) {
  for (int64_t r : {1, 3, 4, 5, 8, 9, 63, 64, 65, 70, 130})
    for (int64_t c : {1, 2, 4, 5, 7, 8, 9}) {
      std::vector<float> from(r * c), to(c * (r + 3), -1.0f);
      for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<float>(i);
      transpose(from.data(), r, c, 2, to.data(), r + 3);
      for (int64_t j = 0; j < c; ++j)
        for (int64_t i = 0; i < r + 3; ++i)
          ASSERT_EQ(to[j * (r + 3) + i], i < r ? 2 * from[i * c + j] : -1.0f) << r << "x" << c;
    }
}

/// Products on four threads against fp64: shares by rows, and by columns where rows are few.
class Shared : public ::testing::TestWithParam<std::pair<int64_t, int64_t>> {
 protected:
  void SetUp() override {
    before_ = at::get_num_threads();
    at::set_num_threads(4);
  }
  void TearDown() override { at::set_num_threads(before_); }

 private:
  int before_ = 1;
};

TEST_P(Shared, ThreadsGiveTheSameProducts) {
  const auto [rows, columns] = GetParam();
  const int64_t r = 19;
  const auto wide = torch::randn({rows, columns}), p = torch::randn({r, columns});
  const auto v = torch::randn({rows, r}), bias = torch::randn({columns});
  const auto bits = torch::randint(0, 256, {rows, (columns + 7) / 8}, torch::kByte);
  const auto exist = torch::arange(columns);
  const auto kept = bits.index_select(1, exist.div(8, "floor"))
                        .bitwise_right_shift(exist.remainder(8).to(torch::kByte))
                        .bitwise_and(1)
                        .to(torch::kDouble);
  const auto exact = wide.to(torch::kDouble) * kept;
  const Tile x = {wide.data_ptr<float>(), columns, bits.data_ptr<uint8_t>(),
                  bits.size(1),           rows,    columns};
  const Rows p_rows = {p.data_ptr<float>(), columns}, v_rows = {v.data_ptr<float>(), r};
  const auto is_near = [](const at::Tensor& got, const at::Tensor& want) {
    return ((got.to(torch::kDouble) - want).norm() / want.norm()).item<double>() < 2e-6;
  };
  auto u = torch::empty({rows, r}), q = torch::empty({r, columns});
  double squares = 0;
  project(x, p_rows, r, u.data_ptr<float>(), &squares);
  EXPECT_TRUE(is_near(u, exact.matmul(p.to(torch::kDouble).t())));
  EXPECT_NEAR(squares / wide.to(torch::kDouble).square().sum().item<double>(), 1, 1e-5);
  reduce(x, v_rows, r, q.data_ptr<float>());
  EXPECT_TRUE(is_near(q, v.to(torch::kDouble).t().matmul(exact)));
  auto u2 = torch::empty_like(u), q2 = torch::empty_like(q), out = torch::empty_like(wide);
  project_and_reduce(x, p_rows, v_rows, r, u2.data_ptr<float>(), q2.data_ptr<float>());
  EXPECT_TRUE(is_near(u2, u.to(torch::kDouble)) && is_near(q2, q.to(torch::kDouble)));
  const Tile to = {out.data_ptr<float>(), columns, bits.data_ptr<uint8_t>(),
                   bits.size(1),          rows,    columns};
  expand(to, v_rows, p_rows, r, {bias.data_ptr<float>(), 0});
  EXPECT_TRUE(is_near(
      out, (v.to(torch::kDouble).matmul(p.to(torch::kDouble)) + bias.to(torch::kDouble)) * kept));
}

INSTANTIATE_TEST_SUITE_P(Sizes, Shared,
                         ::testing::Values(std::pair<int64_t, int64_t>{17, 3001},
                                           std::pair<int64_t, int64_t>{70, 8191},
                                           std::pair<int64_t, int64_t>{1, 40000},
                                           std::pair<int64_t, int64_t>{300, 515},
                                           std::pair<int64_t, int64_t>{1111, 97}));

TEST(Thin, TransposeScalesIntoARowOfBlocks) {
  const std::vector<float> from = {1, 2, 3, 4, 5, 6};  // [2, 3]
  std::vector<float> to(3 * 5, 0.0f);
  transpose(from.data(), 2, 3, 10, to.data() + 1, 5);
  EXPECT_EQ(to, (std::vector<float>{0, 10, 40, 0, 0, 0, 20, 50, 0, 0, 0, 30, 60, 0, 0}));
}

}  // namespace
}  // namespace reslora::thin
