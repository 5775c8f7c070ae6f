// The products of thin_kernels.h for the instruction set of the compiler's flags; RESLORA_ISA is
// its name (base, v3 or v4).
//
// No header with inline functions may be included beyond intrinsics: the linker could take this
// file's copy of one for the whole library, and run it on a processor that lacks its instructions.
#include "cpu/thin_kernels.h"

#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace reslora::thin {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a vector
constexpr int kProjectRows = 6, kProjectRanks = 4;
constexpr int kExpandRows = 8, kExpandVectors = 3;
constexpr int kReduceRanks = 8, kReduceVectors = 3;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kProjectRows = 2, kProjectRanks = 4;
constexpr int kExpandRows = 4, kExpandVectors = 2;
constexpr int kReduceRanks = 4, kReduceVectors = 2;
#else
constexpr int kWidth = 4;
constexpr int kProjectRows = 2, kProjectRanks = 4;
constexpr int kExpandRows = 4, kExpandVectors = 2;
constexpr int kReduceRanks = 4, kReduceVectors = 2;
#endif
constexpr int kTail = 2;  // rows or ranks at a time where fewer than a block are left

typedef float Vector __attribute__((vector_size(4 * kWidth)));
typedef int32_t Lanes __attribute__((vector_size(4 * kWidth)));

#define INLINE __attribute__((always_inline)) inline

INLINE Vector splat(float value) { return value - Vector{}; }

INLINE Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof(v));
  return v;
}

INLINE void store(float* to, Vector v) { memcpy(to, &v, sizeof(v)); }

INLINE float sum_of(Vector v) {
  float parts[kWidth];
  memcpy(parts, &v, sizeof(v));
  for (int width = kWidth / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

typedef float Quad __attribute__((vector_size(16)));
#define PICK __builtin_shufflevector

/// The sums of four vectors: halves are added crosswise, so that a level costs all four one
/// addition.
INLINE Quad sums_of(const Vector (&v)[4]) {
#if defined(__AVX512F__)
  const auto halves = [](Vector a, Vector b) __attribute__((always_inline)) {
    return PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Vector ab = halves(v[0], v[1]), cd = halves(v[2], v[3]);
  const Vector fours = PICK(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                       PICK(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const Vector twos =
      fours + PICK(fours, fours, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  const Vector ones = twos + PICK(twos, twos, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return PICK(ones, ones, 0, 4, 8, 12);
#elif defined(__AVX2__)
  const Vector ab =
      PICK(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
  const Vector cd =
      PICK(v[2], v[3], 0, 1, 2, 3, 8, 9, 10, 11) + PICK(v[2], v[3], 4, 5, 6, 7, 12, 13, 14, 15);
  const Vector twos =
      PICK(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  const Vector ones = twos + PICK(twos, twos, 1, 0, 3, 2, 5, 4, 7, 6);
  return PICK(ones, ones, 0, 4, 2, 6);
#else
  const Vector ab = PICK(v[0], v[1], 0, 1, 4, 5) + PICK(v[0], v[1], 2, 3, 6, 7);
  const Vector cd = PICK(v[2], v[3], 0, 1, 4, 5) + PICK(v[2], v[3], 2, 3, 6, 7);
  return PICK(ab, cd, 0, 2, 4, 6) + PICK(ab, cd, 1, 3, 5, 7);
#endif
}

/// kWidth bits from element j of a row on, of which `count` exist.
template <bool kHasBits>
INLINE uint32_t bits_at(const uint8_t* bits, int64_t j, int count) {
  const uint32_t exist = (1u << count) - 1;
  if (!kHasBits) return exist;
#if defined(__AVX512F__)
  if (count == kWidth) {
    uint16_t pair;
    memcpy(&pair, bits + j / 8, sizeof(pair));
    return pair;
  }
#endif
  if (kWidth == 4) return (bits[j / 8] >> (j % 8)) & exist;
  uint32_t found = bits[j / 8];
  if (kWidth == 16 && count > 8) found |= static_cast<uint32_t>(bits[j / 8 + 1]) << 8;
  return found & exist;
}

INLINE Vector kept(Vector v, uint32_t mask) {
  Lanes lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = 1 << i;
  const Lanes is_kept = ((static_cast<int32_t>(mask) - Lanes{}) & lanes) != 0;
  return (Vector)((Lanes)v & is_kept);
}

/// Elements j... of a row; `count` < kWidth only where kIsTail.
template <bool kHasBits, bool kIsTail>
INLINE Vector load_kept(const float* row, const uint8_t* bits, int64_t j, int count) {
  if (!kHasBits && !kIsTail) return load(row + j);
  const uint32_t mask = bits_at<kHasBits>(bits, j, kIsTail ? count : kWidth);
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), row + j);
#else
  Vector v = {};
  if (kIsTail) {
    memcpy(&v, row + j, sizeof(float) * count);
  } else {
    v = load(row + j);
  }
  return kHasBits ? kept(v, mask) : v;
#endif
}

template <bool kIsTail>
INLINE void store_some(float* row, int64_t j, int count, Vector v) {
  if (kIsTail) {
    memcpy(row + j, &v, sizeof(float) * count);
  } else {
    store(row + j, v);
  }
}

// ---- project: a block of kRows x kRanks dot products at a time ---------------------------------

/// The rows of a block, as addresses that advance alike.
template <int kRows>
struct Block {
  const float* x[kRows];
  const uint8_t* bits[kRows];
};

template <int kRows, int kRanks, bool kHasBits, bool kIsTail>
INLINE void add_dots(const Block<kRows>& rows, Rows p, int64_t j, int count,
                     Vector (&sums)[kRows][kRanks]) {
  Vector ps[kRanks];
  for (int k = 0; k < kRanks; ++k)
    ps[k] = load_kept<false, kIsTail>(p.data + k * p.stride, nullptr, j, count);
  for (int i = 0; i < kRows; ++i) {
    const Vector xs = load_kept<kHasBits, kIsTail>(rows.x[i], rows.bits[i], j, count);
    for (int k = 0; k < kRanks; ++k) sums[i][k] += xs * ps[k];
  }
}

template <int kRows, int kRanks, bool kHasBits>
INLINE void project_block(const Tile& x, int64_t row, Rows p, float* u, int64_t u_stride) {
  Block<kRows> rows;
  for (int i = 0; i < kRows; ++i) {
    rows.x[i] = x.data + (row + i) * x.stride;
    rows.bits[i] = kHasBits ? x.bits + (row + i) * x.bit_stride : nullptr;
  }
  Vector sums[kRows][kRanks] = {};
  int64_t j = 0;
  for (; j + kWidth <= x.columns; j += kWidth)
    add_dots<kRows, kRanks, kHasBits, false>(rows, p, j, kWidth, sums);
  if (j < x.columns)
    add_dots<kRows, kRanks, kHasBits, true>(rows, p, j, static_cast<int>(x.columns - j), sums);
  for (int i = 0; i < kRows; ++i) {
    float* to = u + (row + i) * u_stride;
    if constexpr (kRanks == 4) {
      Quad before;
      memcpy(&before, to, sizeof(before));
      before += sums_of(sums[i]);
      memcpy(to, &before, sizeof(before));
    } else {
      for (int k = 0; k < kRanks; ++k) to[k] += sum_of(sums[i][k]);
    }
  }
}

template <int kRows, bool kHasBits>
INLINE void project_rows(const Tile& x, int64_t row, Rows p, int64_t r, float* u,
                         int64_t u_stride) {
  int64_t k = 0;
  for (; k + kProjectRanks <= r; k += kProjectRanks)
    project_block<kRows, kProjectRanks, kHasBits>(x, row, {p.data + k * p.stride, p.stride}, u + k,
                                                  u_stride);
  for (; k < r; ++k)
    project_block<kRows, 1, kHasBits>(x, row, {p.data + k * p.stride, p.stride}, u + k, u_stride);
}

template <bool kHasBits>
void project_tile(const Tile& x, Rows p, int64_t r, float* u, int64_t u_stride) {
  int64_t row = 0;
  for (; row + kProjectRows <= x.rows; row += kProjectRows)
    project_rows<kProjectRows, kHasBits>(x, row, p, r, u, u_stride);
  for (; row + kTail <= x.rows; row += kTail)
    project_rows<kTail, kHasBits>(x, row, p, r, u, u_stride);
  for (; row < x.rows; ++row) project_rows<1, kHasBits>(x, row, p, r, u, u_stride);
}

void project(const Tile& x, Rows p, int64_t r, float* u, int64_t u_stride) {
  (x.bits ? project_tile<true> : project_tile<false>)(x, p, r, u, u_stride);
}

// ---- expand: a block of kRows x kVectors vectors of the result at a time -----------------------

struct Expansion {
  Rows u;
  Rows p;
  int64_t r;
  Rows base;
};

template <int kRows, int kVectors, bool kHasBits, bool kIsTail>
INLINE void expand_block(const Tile& out, const Expansion& e, int64_t row, int64_t j, int count) {
  Vector sums[kRows][kVectors] = {};
  if (e.base.data) {
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVectors; ++v)
        sums[i][v] = load_kept<false, kIsTail>(e.base.data + (row + i) * e.base.stride, nullptr,
                                               j + v * kWidth, count);
  }
  for (int64_t k = 0; k < e.r; ++k) {
    Vector ps[kVectors];
    for (int v = 0; v < kVectors; ++v)
      ps[v] = load_kept<false, kIsTail>(e.p.data + k * e.p.stride, nullptr, j + v * kWidth, count);
    for (int i = 0; i < kRows; ++i) {
      const Vector us = splat(e.u.data[(row + i) * e.u.stride + k]);
      for (int v = 0; v < kVectors; ++v) sums[i][v] += us * ps[v];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * kWidth;
      Vector value = sums[i][v];
      if (kHasBits)
        value = kept(value, bits_at<true>(out.bits + (row + i) * out.bit_stride, at, count));
      store_some<kIsTail>(out.data + (row + i) * out.stride, at, count, value);
    }
}

template <int kRows, bool kHasBits>
INLINE void expand_rows(const Tile& out, const Expansion& e, int64_t row) {
  int64_t j = 0;
  for (; j + kExpandVectors * kWidth <= out.columns; j += kExpandVectors * kWidth)
    expand_block<kRows, kExpandVectors, kHasBits, false>(out, e, row, j, kWidth);
  for (; j + kWidth <= out.columns; j += kWidth)
    expand_block<kRows, 1, kHasBits, false>(out, e, row, j, kWidth);
  if (j < out.columns)
    expand_block<kRows, 1, kHasBits, true>(out, e, row, j, static_cast<int>(out.columns - j));
}

template <bool kHasBits>
void expand_tile(const Tile& out, const Expansion& e) {
  int64_t row = 0;
  for (; row + kExpandRows <= out.rows; row += kExpandRows)
    expand_rows<kExpandRows, kHasBits>(out, e, row);
  for (; row + kTail <= out.rows; row += kTail) expand_rows<kTail, kHasBits>(out, e, row);
  for (; row < out.rows; ++row) expand_rows<1, kHasBits>(out, e, row);
}

void expand(const Tile& out, Rows u, Rows p, int64_t r, Rows base) {
  const Expansion e = {u, p, r, base};
  (out.bits ? expand_tile<true> : expand_tile<false>)(out, e);
}

// ---- reduce: a block of kRanks x kVectors vectors of p at a time -------------------------------

template <int kRanks, int kVectors, bool kHasBits, bool kIsTail>
INLINE void reduce_block(const Tile& x, Rows u, float* p, int64_t p_stride, int64_t j, int count) {
  Vector sums[kRanks][kVectors] = {};
  for (int64_t i = 0; i < x.rows; ++i) {
    Vector xs[kVectors];
    for (int v = 0; v < kVectors; ++v)
      xs[v] = load_kept<kHasBits, kIsTail>(
          x.data + i * x.stride, x.bits + (kHasBits ? i * x.bit_stride : 0), j + v * kWidth, count);
    for (int k = 0; k < kRanks; ++k) {
      const Vector us = splat(u.data[i * u.stride + k]);
      for (int v = 0; v < kVectors; ++v) sums[k][v] += us * xs[v];
    }
  }
  for (int k = 0; k < kRanks; ++k)
    for (int v = 0; v < kVectors; ++v) {
      float* row = p + k * p_stride;
      const Vector before = load_kept<false, kIsTail>(row, nullptr, j + v * kWidth, count);
      store_some<kIsTail>(row, j + v * kWidth, count, before + sums[k][v]);
    }
}

template <int kRanks, bool kHasBits>
INLINE void reduce_ranks(const Tile& x, Rows u, float* p, int64_t p_stride) {
  int64_t j = 0;
  for (; j + kReduceVectors * kWidth <= x.columns; j += kReduceVectors * kWidth)
    reduce_block<kRanks, kReduceVectors, kHasBits, false>(x, u, p, p_stride, j, kWidth);
  for (; j + kWidth <= x.columns; j += kWidth)
    reduce_block<kRanks, 1, kHasBits, false>(x, u, p, p_stride, j, kWidth);
  if (j < x.columns)
    reduce_block<kRanks, 1, kHasBits, true>(x, u, p, p_stride, j, static_cast<int>(x.columns - j));
}

template <bool kHasBits>
void reduce_tile(const Tile& x, Rows u, int64_t r, float* p, int64_t p_stride) {
  int64_t k = 0;
  for (; k + kReduceRanks <= r; k += kReduceRanks)
    reduce_ranks<kReduceRanks, kHasBits>(x, {u.data + k, u.stride}, p + k * p_stride, p_stride);
  for (; k + kTail <= r; k += kTail)
    reduce_ranks<kTail, kHasBits>(x, {u.data + k, u.stride}, p + k * p_stride, p_stride);
  for (; k < r; ++k)
    reduce_ranks<1, kHasBits>(x, {u.data + k, u.stride}, p + k * p_stride, p_stride);
}

void reduce(const Tile& x, Rows u, int64_t r, float* p, int64_t p_stride) {
  (x.bits ? reduce_tile<true> : reduce_tile<false>)(x, u, r, p, p_stride);
}

double sum_of_squares(const Tile& x) {
  double total = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    const float* row = x.data + i * x.stride;
    Vector sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * kWidth <= x.columns; j += 4 * kWidth)
      for (int v = 0; v < 4; ++v) {
        const Vector xs = load(row + j + v * kWidth);
        sums[v] += xs * xs;
      }
    float rest = 0;
    for (; j < x.columns; ++j) rest += row[j] * row[j];
    total += static_cast<double>(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]))) + rest;
  }
  return total;
}

typedef uint16_t Shorts __attribute__((vector_size(2 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

/// bfloat16 is the upper half of fp32.
INLINE Vector load_bf16(const uint16_t* from) {
  Shorts halves;
  memcpy(&halves, from, sizeof(halves));
  return (Vector)(__builtin_convertvector(halves, Words) << 16);
}

double sum_of_squares_bf16(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, x += stride) {
    Vector sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * kWidth <= columns; j += 4 * kWidth)
      for (int v = 0; v < 4; ++v) {
        const Vector xs = load_bf16(x + j + v * kWidth);
        sums[v] += xs * xs;
      }
    float rest = 0;
    for (; j < columns; ++j) {
      const uint32_t bits = static_cast<uint32_t>(x[j]) << 16;
      float value;
      memcpy(&value, &bits, sizeof(value));
      rest += value * value;
    }
    total += static_cast<double>(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]))) + rest;
  }
  return total;
}

}  // namespace

#define RESLORA_NAME_OF(isa) kKernels_##isa
#define RESLORA_NAME(isa) RESLORA_NAME_OF(isa)
const Kernels RESLORA_NAME(RESLORA_ISA) = {project, expand, reduce, sum_of_squares,
                                           sum_of_squares_bf16};

}  // namespace reslora::thin
