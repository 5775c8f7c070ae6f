// The kernels that move, mask or sum up elements: values, types, strides, tails.
#include "cuda/elementwise.h"

#include "cuda/device.cuh"
#include "harness.h"

namespace kernel_tests {
namespace {

using namespace reslora::cuda;

/// fp32 or fp64 numbers in memory of exact size.
template <typename T>
struct Numbers {
  explicit Numbers(int64_t count) : size(count), data(std::make_unique<T[]>(count)) {
    std::fill_n(data.get(), size, T(NAN));
  }
  Numbers& fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size; ++i) data[i] = static_cast<T>(normal(random));
    return *this;
  }
  T& operator[](int64_t i) { return data[i]; }

  int64_t size;
  std::unique_ptr<T[]> data;
};

constexpr int64_t kRows = 37, kColumns = 9;

Strided rows_of(const Numbers<float>& m, int64_t columns) {
  return {m.data.get(), Element::kFloat, columns, 1};
}

TEST(Pieces, CastScaleAndTransposeInOneLaunch) {
  std::mt19937 random(1);
  Numbers<float> first(kRows * kColumns);
  Numbers<double> second(kRows * kColumns);
  first.fill(random), second.fill(random);
  Buffer out(kRows, 2 * kColumns, Type::kBFloat16, 3);
  PiecesArgs args;
  args.count = 2;
  Piece& one = args.pieces[0];
  one.from = rows_of(first, kColumns);
  one.to = {out.data(), Element::kBFloat16, out.stride, 1};
  one.rows = kRows, one.columns = kColumns, one.alpha = 0.5f;
  Piece& two = args.pieces[1];
  two = one;
  two.from = {second.data.get(), Element::kDouble, 1, kRows};  // column by column
  two.to.data = out.data() + kColumns;
  ASSERT_EQ(launch_pieces(args, nullptr), cudaSuccess);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kColumns; ++j) {
      EXPECT_EQ(out.at(i, j), encode(0.5f * first[i * kColumns + j], Type::kBFloat16));
      const auto value = static_cast<float>(second[j * kRows + i]);
      EXPECT_EQ(out.at(i, kColumns + j), encode(0.5f * value, Type::kBFloat16));
    }
  EXPECT_TRUE(out.has_clean_gaps());
}

TEST(Pieces, SumPartsInOrderAndAddWhatIsGiven) {
  std::mt19937 random(2);
  constexpr int64_t kParts = 3, kSize = kRows * kColumns;
  Numbers<float> parts(kParts * kSize);
  Numbers<double> out(kSize);
  parts.fill(random);
  Buffer addend(kRows, kColumns, Type::kHalf, 5);
  addend.fill(random);
  PiecesArgs args;
  args.count = 1;
  Piece& piece = args.pieces[0];
  piece.from = rows_of(parts, kColumns);
  piece.parts = kParts, piece.part_stride = kSize;
  piece.addends[1] = {addend.data(), Element::kHalf, addend.stride, 1};
  piece.to = {out.data.get(), Element::kDouble, kColumns, 1};
  piece.rows = kRows, piece.columns = kColumns, piece.alpha = 2.0f;
  ASSERT_EQ(launch_pieces(args, nullptr), cudaSuccess);
  for (int64_t i = 0; i < kSize; ++i) {
    const float sum = parts[i] + parts[kSize + i] + parts[2 * kSize + i];
    const auto added = static_cast<float>(addend.value(i / kColumns, i % kColumns));
    EXPECT_EQ(out[i], static_cast<double>(2.0f * sum + added));
  }
  // Onto itself, as taps are added by and by.
  piece.parts = 1, piece.alpha = 1.0f, piece.from = piece.to, piece.addends[1] = {};
  piece.addends[0] = piece.to;
  const double before = out[5];
  ASSERT_EQ(launch_pieces(args, nullptr), cudaSuccess);
  EXPECT_EQ(out[5], static_cast<double>(2 * static_cast<float>(before)));
}

TEST(Pieces, StartNothingWhereNothingIsToDo) {
  const int64_t before = cuda_on_cpu::launches();
  EXPECT_EQ(launch_pieces({}, nullptr), cudaSuccess);
  EXPECT_EQ(cuda_on_cpu::launches(), before);
}

// ---- drop

TEST(Drop, DrawsTheBitsOfProjectAndAppliesThem) {
  std::mt19937 random(3);
  const int64_t T = 5, n = 43;
  Buffer x(T, n, Type::kBFloat16, 2, 1), A(4, n, Type::kBFloat16), u(T, 4, Type::kBFloat16);
  x.fill(random), A.fill(random);
  Buffer out(T, n, Type::kBFloat16, 1);
  Bits drawn(T, n), by_project(T, n);
  const Philox philox{11, 8};
  const Mask mask{Dropout::kDrawn, drawn.bytes.get(), 40000, philox};
  ASSERT_EQ(launch_drop({Element::kBFloat16, x, out, mask}, nullptr), cudaSuccess);
  ProjectArgs args{Type::kBFloat16, x, A, u, 1.0f, mask, nullptr, {}, 1};
  args.mask.bits = by_project.bytes.get();
  run(args);
  EXPECT_TRUE(
      std::equal(drawn.bytes.get(), drawn.bytes.get() + drawn.count, by_project.bytes.get()));
  for (int64_t i = 0; i < T; ++i)
    for (int64_t j = 0; j < n; ++j)
      EXPECT_EQ(out.value(i, j), drawn.keeps(i, j) ? x.value(i, j) : 0.0);
  EXPECT_TRUE(out.has_clean_gaps());
}

TEST(Drop, AppliesGivenBitsInPlaceInFp64) {
  std::mt19937 random(4);
  const int64_t T = 3, n = 17;
  Numbers<double> x(T * n);
  x.fill(random);
  std::vector<double> before(x.data.get(), x.data.get() + x.size);
  before[0] = x[0] = INFINITY;  // dropped, it becomes 0, not NaN
  Bits bits(T, n);
  bits.fill(random);
  bits.bytes[0] &= 0xfe;
  const Matrix out{x.data.get(), T, n, n};
  const Mask mask{Dropout::kGiven, bits.bytes.get(), 0, {}};
  ASSERT_EQ(launch_drop({Element::kDouble, {out.data, T, n, n}, out, mask}, nullptr), cudaSuccess);
  for (int64_t i = 0; i < T; ++i)
    for (int64_t j = 0; j < n; ++j)
      EXPECT_EQ(x[i * n + j], bits.keeps(i, j) ? before[i * n + j] : 0.0);
}

// ---- norms

TEST(Norms, AreOfTheColumnsOfEachLayer) {
  std::mt19937 random(5);
  Buffer u(300, 24, Type::kHalf, 1);
  u.fill(random);
  const std::vector<float> squares(2500, 4.0f);  // more than a block has threads
  Numbers<float> out(4);
  const Strided columns = {u.data(), Element::kHalf, u.stride, 1};
  NormsArgs args = {squares.data(), 2500, columns, 300, {0, 16}, {8, 5}, 2, out.data.get()};
  ASSERT_EQ(launch_norms(args, nullptr), cudaSuccess);
  for (int g = 0; g < 2; ++g) {
    double sum = 0;
    for (int64_t i = 0; i < 300; ++i)
      for (int64_t k = 0; k < args.columns[g]; ++k)
        sum += u.value(i, args.first[g] + k) * u.value(i, args.first[g] + k);
    EXPECT_EQ(out[2 * g], 100.0f);
    EXPECT_NEAR(out[2 * g + 1], std::sqrt(sum), 1e-5 * std::sqrt(sum));
  }
}

TEST(Record, WritesTheNextColumnOfTheRing) {
  Numbers<float> ring(6);
  int64_t written = 4;
  const float norms[] = {1.5f, 2.5f};
  ASSERT_EQ(launch_record({norms, ring.data.get(), 3, &written}, nullptr), cudaSuccess);
  EXPECT_EQ(written, 5);
  EXPECT_EQ(ring[1], 1.5f);
  EXPECT_EQ(ring[4], 2.5f);
  EXPECT_TRUE(std::isnan(ring[0]) && std::isnan(ring[2]) && std::isnan(ring[5]));
}

}  // namespace
}  // namespace kernel_tests
