// What the kernel tests share: shapes, 16-bit buffers of exact size, fp64 references, error bounds.
//
// A product is judged as low-precision code is: its largest error against fp64 may be at most
// `factor` times that of the plain path, which accumulates in fp32, rounds the product to 16 bits,
// multiplies and rounds again. Half a unit in the last place of the largest value is always
// allowed: a correct result can have that error where a short plain sum happens to be exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "cuda/elementwise.h"
#include "cuda/launch.h"
#include "emulator.h"

namespace kernel_tests {

using reslora::cuda::ConstMatrix;
using reslora::cuda::Type;

inline float decode(uint16_t bits, Type type) {
  if (type == Type::kHalf) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

inline uint16_t encode(float value, Type type) {
  if (type == Type::kHalf) return static_cast<__half_raw>(__float2half(value)).x;
  return static_cast<__nv_bfloat16_raw>(__float2bfloat16(value)).x;
}

/// Half a unit in the last place, relative to the value.
inline double half_ulp(Type type) { return type == Type::kHalf ? 0x1p-11 : 0x1p-8; }

/// rows x columns of 16-bit elements. `gap` unused elements follow each row, and `shift` come
/// before the first: both odd values make rows that no vector can read.
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns, Type type, int64_t gap = 0, int64_t shift = 0)
      : rows(rows), columns(columns), stride(columns + gap), type_(type), shift_(shift) {
    const int64_t size = rows ? shift + (rows - 1) * stride + columns : shift;
    size_ = static_cast<size_t>(size);
    data_ = std::make_unique<uint16_t[]>(size_);
    std::fill_n(data_.get(), size_, kUnset);
  }

  Buffer& fill(std::mt19937& random, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) at(i, j) = encode(normal(random), type_);
    return *this;
  }

  uint16_t& at(int64_t i, int64_t j) { return data_[shift_ + i * stride + j]; }
  double value(int64_t i, int64_t j) const { return decode(data_[shift_ + i * stride + j], type_); }
  uint16_t* data() { return data_.get() + shift_; }
  std::vector<uint16_t> content() const { return {data_.get(), data_.get() + size_}; }
  size_t bytes() const { return 2 * static_cast<size_t>(rows * columns); }
  Type type() const { return type_; }

  operator ConstMatrix() { return {data(), rows, columns, stride}; }
  operator reslora::cuda::Matrix() { return {data(), rows, columns, stride}; }

  /// The elements between and before the rows are as they were made.
  bool has_clean_gaps() const {
    for (int64_t i = 0; i < static_cast<int64_t>(size_); ++i) {
      const bool is_gap = i < shift_ || (i - shift_) % stride >= columns;
      if (is_gap && data_[i] != kUnset) return false;
    }
    return true;
  }

  const int64_t rows, columns, stride;

 private:
  static constexpr uint16_t kUnset = 0x7fff;  // NaN in both types
  Type type_;
  int64_t shift_;
  size_t size_;
  std::unique_ptr<uint16_t[]> data_;  // of exact size: AddressSanitizer sees one element beyond
};

/// A matrix of exact values, for references.
struct Exact {
  Exact(int64_t rows, int64_t columns) : rows(rows), columns(columns), values(rows * columns) {}
  double& at(int64_t i, int64_t j) { return values[static_cast<size_t>(i * columns + j)]; }
  double at(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * columns + j)]; }

  int64_t rows, columns;
  std::vector<double> values;
};

inline Exact exact(const Buffer& b) {
  Exact e(b.rows, b.columns);
  for (int64_t i = 0; i < b.rows; ++i)
    for (int64_t j = 0; j < b.columns; ++j) e.at(i, j) = b.value(i, j);
  return e;
}

inline Exact transposed(const Exact& e) {
  Exact t(e.columns, e.rows);
  for (int64_t i = 0; i < e.rows; ++i)
    for (int64_t j = 0; j < e.columns; ++j) t.at(j, i) = e.at(i, j);
  return t;
}

/// A product in fp64, and the same on the plain low-precision path.
struct Reference {
  Exact exact;
  Exact plain;
};

/// alpha * left right + base; `base` may be null.
inline Reference product(const Exact& left, const Exact& right, double alpha, Type type,
                         const Exact* base = nullptr) {
  Reference out{Exact(left.rows, right.columns), Exact(left.rows, right.columns)};
  for (int64_t i = 0; i < left.rows; ++i) {
    for (int64_t j = 0; j < right.columns; ++j) {
      double sum = 0;
      float plain = 0;
      for (int64_t k = 0; k < left.columns; ++k) {
        sum += left.at(i, k) * right.at(k, j);
        plain += static_cast<float>(left.at(i, k)) * static_cast<float>(right.at(k, j));
      }
      const double added = base ? base->at(i, j) : 0;
      const float scaled = static_cast<float>(alpha) * decode(encode(plain, type), type);
      out.exact.at(i, j) = alpha * sum + added;
      out.plain.at(i, j) = decode(encode(scaled + static_cast<float>(added), type), type);
    }
  }
  return out;
}

inline double largest(const Exact& e) {
  double most = 0;
  for (double v : e.values) most = std::max(most, std::abs(v));
  return most;
}

/// The largest error; infinite where a value is NaN.
inline double error_of(const Exact& got, const Exact& want) {
  double most = 0;
  for (size_t i = 0; i < want.values.size(); ++i) {
    const double error = std::abs(got.values[i] - want.values[i]);
    most = std::max(most, std::isnan(error) ? INFINITY : error);
  }
  return most;
}

/// Expects `got` to be as near to fp64 as the header says, and nothing written beside it.
inline void expect_near(const Buffer& got, const Reference& want, double factor) {
  const double allowed = std::max(factor * error_of(want.plain, want.exact),
                                  half_ulp(got.type()) * largest(want.exact));
  EXPECT_LE(error_of(exact(got), want.exact), allowed);
  EXPECT_TRUE(got.has_clean_gaps());
}

/// Dropout bits: uint8 [T, ceil(n/8)].
struct Bits {
  Bits(int64_t T, int64_t n) : row_bytes((n + 7) / 8), count(T * row_bytes) {
    bytes = std::make_unique<uint8_t[]>(static_cast<size_t>(count));
  }
  Bits& fill(std::mt19937& random) {
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(random() | random());
    return *this;
  }
  bool keeps(int64_t i, int64_t j) const { return bytes[i * row_bytes + j / 8] >> (j % 8) & 1; }

  int64_t row_bytes, count;
  std::unique_ptr<uint8_t[]> bytes;
};

inline Exact kept(Exact e, const Bits& bits) {
  for (int64_t i = 0; i < e.rows; ++i)
    for (int64_t j = 0; j < e.columns; ++j)
      if (!bits.keeps(i, j)) e.at(i, j) = 0;
  return e;
}

// ---- Launches

/// Memory for the parts of a sum, to the float.
class Sum {
 public:
  Sum(int64_t count, int64_t rows, int64_t columns)
      : count_(count),
        rows_(rows),
        columns_(columns),
        memory_(std::make_unique<float[]>(static_cast<size_t>(count * rows * columns))) {
    std::fill_n(memory_.get(), count * rows * columns, NAN);
  }
  reslora::cuda::Parts parts() { return {memory_.get(), rows_ * columns_, columns_}; }
  float* data() { return memory_.get(); }
  size_t bytes() const { return sizeof(float) * static_cast<size_t>(count_ * rows_ * columns_); }

  /// to = alpha * the sum of the parts.
  void add_up(const reslora::cuda::Matrix& to, Type type, float alpha) {
    using reslora::cuda::Element;
    reslora::cuda::PiecesArgs args;
    args.count = 1;
    reslora::cuda::Piece& piece = args.pieces[0];
    piece.from = {memory_.get(), Element::kFloat, columns_, 1};
    piece.parts = count_, piece.part_stride = rows_ * columns_;
    piece.to = {to.data, type == Type::kHalf ? Element::kHalf : Element::kBFloat16, to.stride, 1};
    piece.rows = rows_, piece.columns = columns_, piece.alpha = alpha;
    ASSERT_EQ(launch_pieces(args, nullptr), cudaSuccess);
  }

 private:
  int64_t count_, rows_, columns_;
  std::unique_ptr<float[]> memory_;
};

/// Runs project, and adds up what its blocks leave. Returns the sum of squares.
inline double run(reslora::cuda::ProjectArgs args) {
  const reslora::cuda::Cut cut = cut_of(args);
  Sum u(cut.ranges > 1 ? cut.ranges : 0, args.u.rows, args.u.columns);
  Sum squares(cut.tiles * cut.ranges, 1, 1);
  if (cut.ranges > 1) args.parts = u.parts();
  args.squares = squares.data();
  EXPECT_EQ(launch_project(args, nullptr), cudaSuccess);
  if (cut.ranges > 1) u.add_up(args.u, args.type, args.alpha);
  double sum = 0;
  for (int64_t i = 0; i < cut.tiles * cut.ranges; ++i) sum += squares.data()[i];
  return sum;
}

/// Runs expand_grad: ds and dB are alpha times the sums of what its blocks leave.
inline void run(reslora::cuda::ExpandGradArgs args, Buffer& ds, Buffer& dB, float alpha) {
  const reslora::cuda::Cut cut = cut_of(args);
  Sum of_ds(cut.tiles, ds.rows, ds.columns), of_dB(cut.ranges, dB.rows, dB.columns);
  args.ds = of_ds.parts(), args.dB = of_dB.parts();
  ASSERT_EQ(launch_expand_grad(args, nullptr), cudaSuccess);
  of_ds.add_up(ds, args.type, alpha), of_dB.add_up(dB, args.type, alpha);
}

/// Runs project_grad: dA is alpha times the sum of what its blocks leave.
inline void run(reslora::cuda::ProjectGradArgs args, Buffer& dA, float alpha) {
  Sum of_dA(cut_of(args).ranges, dA.rows, dA.columns);
  args.dA = of_dA.parts();
  ASSERT_EQ(launch_project_grad(args, nullptr), cudaSuccess);
  of_dA.add_up(dA, args.type, alpha);
}

// ---- Shapes

struct Shape {
  int64_t T;
  int64_t n;  // the wide side: in or out
  int64_t R;
  int64_t gap = 0;    // unused elements between the rows of wide matrices
  int64_t shift = 0;  // and before the first
  int multiprocessors = 1;
};

inline void PrintTo(const Shape& s, std::ostream* out) {
  *out << "T" << s.T << "_n" << s.n << "_R" << s.R << "_gap" << s.gap << "_shift" << s.shift << "_m"
       << s.multiprocessors;
}

inline bool is_full() { return std::getenv("RESLORA_FULL") != nullptr; }

/// Eight shapes that between them have every tail, and tiles without; with RESLORA_FULL 46. The
/// last two cut their columns or rows into ranges that are added up.
inline std::vector<Shape> shapes() {
  std::vector<Shape> all = {
      {1, 64, 16},   {37, 100, 9, 4}, {66, 72, 33, 3, 1, 4}, {17, 130, 65, 0, 0, 4},
      {128, 136, 8}, {40, 1032, 24},  {3, 1100, 9, 4, 0, 8}, {260, 72, 17, 8, 0, 8}};
  if (!is_full()) return all;
  const int64_t T[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 130};
  const int64_t n[] = {8, 1, 63, 64, 65, 120, 128, 129, 257, 520};
  const int64_t R[] = {1, 8, 9, 15, 16, 17, 32, 33, 64, 65, 127, 128};
  for (int i = 0; i < 36; ++i) {
    Shape shape = {T[i % 10], n[(7 * i + i / 10) % 10], R[(5 * i + i / 12) % 12]};
    shape.gap = i % 3 == 0 ? (8 - shape.n % 8) % 8 + 8 : i % 4 == 0 ? 5 : 0;
    shape.shift = i % 5 == 0 ? 3 : i % 7 == 0 ? 8 : 0;
    shape.multiprocessors = i % 4 + 1;
    all.push_back(shape);
  }
  all.push_back({16, 600, 16, 0, 0, 8});  // more than one span of expand_grad
  all.push_back({0, 40, 8});
  return all;
}

struct Case {
  Type type;
  Shape shape;
};

inline void PrintTo(const Case& c, std::ostream* out) {
  *out << (c.type == Type::kHalf ? "half_" : "bfloat16_");
  PrintTo(c.shape, out);
}

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (Type type : {Type::kBFloat16, Type::kHalf})
    for (const Shape& shape : shapes()) all.push_back({type, shape});
  return all;
}

inline std::string name_of(const testing::TestParamInfo<Case>& info) {
  return testing::PrintToString(info.param);
}

}  // namespace kernel_tests
