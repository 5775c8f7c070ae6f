// Products of a wide matrix with a thin one, tile by tile, for one instruction set.
//
// "Wide" is x, dx, y or dy [T, n]; "thin" is u [T, r] or p [r, n], row-major and dense in its rows.
// A tile is some rows and columns of a wide matrix, few enough to stay in a core's cache. fp32.
// thin_kernels.cpp is compiled once for each instruction set; thin_products.h chooses and threads.
#pragma once

#include <cstdint>

namespace reslora::thin {

/// Rows and columns of a wide matrix, and which elements dropout keeps: element (i, j) where bit
/// j % 8 of byte j / 8 of the bits' row i is 1. Without bits all are kept.
struct Tile {
  float* data;
  int64_t stride;
  const uint8_t* bits;
  int64_t bit_stride;
  int64_t rows;
  int64_t columns;
};

/// A thin matrix or the base of a wide one: row i begins at data + i * stride.
struct Rows {
  const float* data;
  int64_t stride;
};

struct Kernels {
  /// u[i, k] += sum_j kept x[i, j] p[k, j], for k < r.
  void (*project)(const Tile& x, Rows p, int64_t r, float* u, int64_t u_stride);
  /// out[i, j] = kept (base[i, j] + sum_k u[i, k] p[k, j]), dropped elements 0; base may be null.
  void (*expand)(const Tile& out, Rows u, Rows p, int64_t r, Rows base);
  /// p[k, j] += sum_i u[i, k] kept x[i, j], for k < r.
  void (*reduce)(const Tile& x, Rows u, int64_t r, float* p, int64_t p_stride);
  /// The sum of x[i, j]^2, dropped or not.
  double (*sum_of_squares)(const Tile& x);
  /// The same of bfloat16 numbers, `columns` in each row; rows `stride` apart.
  double (*sum_of_squares_bf16)(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns);
};

// Ends in the name that CMake gives the instruction set. NOLINTBEGIN(readability-identifier-naming)
extern const Kernels kKernels_base;  // what every processor of the architecture runs
extern const Kernels kKernels_v3;    // x86-64-v3: AVX2 and FMA
extern const Kernels kKernels_v4;    // x86-64-v4: AVX-512
// NOLINTEND(readability-identifier-naming)

}  // namespace reslora::thin
