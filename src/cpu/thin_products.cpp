// Threads, tiles and the choice of an instruction set for the products of thin_kernels.h.
#include "cpu/thin_products.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace reslora::thin {
namespace {

// A tile of 48 rows (whole blocks of every kernel) x 1024 columns: 192 KiB, a fraction of L2.
constexpr int64_t kTileRows = 48;
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kShareRows = 24;            // threads share multiples of it: whole blocks again
constexpr int64_t kSumRows = 96 * kTileRows;  // added up apart: long sums in fp32 lose digits
constexpr int64_t kThreadWork = 256 * 1024;   // multiply-adds below which a thread is not worth it

const Kernels& best_kernels() {
  static const Kernels& best = *supported_kernels().front();
  return best;
}

Tile part_of(const Tile& x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  return {x.data + row * x.stride + column,
          x.stride,
          x.bits ? x.bits + row * x.bit_stride + column / 8 : nullptr,
          x.bit_stride,
          rows,
          columns};
}

Rows from(Rows matrix, int64_t row, int64_t column) {
  if (!matrix.data) return matrix;
  return {matrix.data + row * matrix.stride + column, matrix.stride};
}

/// How many threads share the rows of x.
int64_t shares_of(const Tile& x, int64_t r) {
  const int64_t units = (x.rows + kShareRows - 1) / kShareRows;
  const int64_t worth = x.rows * x.columns * r / kThreadWork;
  return std::clamp<int64_t>(std::min(worth, units), 1, at::get_num_threads());
}

/// Calls body(share, first row, rows) for each share of x's rows.
template <typename Body>
void for_shares(const Tile& x, int64_t shares, const Body& body) {
  const int64_t units = (x.rows + kShareRows - 1) / kShareRows;
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = units * share / shares * kShareRows;
      const int64_t last = std::min(x.rows, units * (share + 1) / shares * kShareRows);
      body(share, first, last - first);
    }
  });
}

/// Calls body(tile, row, column) for the tiles of some rows of x.
template <typename Body>
void for_tiles(const Tile& x, int64_t first, int64_t rows, const Body& body) {
  for (int64_t row = first; row < first + rows; row += kTileRows)
    for (int64_t column = 0; column < x.columns; column += kTileColumns)
      body(part_of(x, row, std::min(kTileRows, first + rows - row), column,
                   std::min(kTileColumns, x.columns - column)),
           row, column);
}

/// Adds one matrix to another of the same size.
void add(const float* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
}

/// p = the sum over shares of what `body(first row, rows, partial)` adds to a zeroed partial.
template <typename Body>
void reduce_over_shares(const Tile& x, int64_t r, float* p, const Body& body) {
  const int64_t shares = shares_of(x, r), size = r * x.columns;
  std::vector<float> others((shares - 1) * size);  // zeros
  std::fill(p, p + size, 0.0f);
  for_shares(x, shares, [&](int64_t share, int64_t first, int64_t rows) {
    float* total = share == 0 ? p : others.data() + (share - 1) * size;
    if (rows <= kSumRows) return body(first, rows, total);
    std::vector<float> part(size);
    for (int64_t row = first; row < first + rows; row += kSumRows) {
      std::fill(part.begin(), part.end(), 0.0f);
      body(row, std::min(kSumRows, first + rows - row), part.data());
      add(part.data(), size, total);
    }
  });
  for (int64_t share = 1; share < shares; ++share) add(others.data() + (share - 1) * size, size, p);
}

}  // namespace

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
    found.push_back(&kKernels_v4);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    found.push_back(&kKernels_v3);
#endif
  found.push_back(&kKernels_base);
  return found;
}

void project(const Tile& x, Rows p, int64_t r, float* u, double* squares) {
  const Kernels& kernels = best_kernels();
  const int64_t shares = shares_of(x, r);
  std::vector<double> sums(shares, 0.0);
  for_shares(x, shares, [&](int64_t share, int64_t first, int64_t rows) {
    std::fill(u + first * r, u + (first + rows) * r, 0.0f);
    for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
      kernels.project(tile, from(p, 0, column), r, u + row * r, r);
      if (squares) sums[share] += kernels.sum_of_squares(tile);
    });
  });
  if (!squares) return;
  *squares = 0;
  for (const double sum : sums) *squares += sum;
}

void expand(const Tile& out, Rows u, Rows p, int64_t r, Rows base) {
  const Kernels& kernels = best_kernels();
  for_shares(out, shares_of(out, r), [&](int64_t, int64_t first, int64_t rows) {
    const Tile share = part_of(out, first, rows, 0, out.columns);
    kernels.expand(share, from(u, first, 0), p, r, from(base, first, 0));
  });
}

void reduce(const Tile& x, Rows u, int64_t r, float* p) {
  const Kernels& kernels = best_kernels();
  reduce_over_shares(x, r, p, [&](int64_t first, int64_t rows, float* partial) {
    for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
      kernels.reduce(tile, from(u, row, 0), r, partial + column, x.columns);
    });
  });
}

void project_and_reduce(const Tile& x, Rows p, Rows v, int64_t r, float* u, float* q) {
  const Kernels& kernels = best_kernels();
  reduce_over_shares(x, r, q, [&](int64_t first, int64_t rows, float* partial) {
    std::fill(u + first * r, u + (first + rows) * r, 0.0f);
    for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
      kernels.project(tile, from(p, 0, column), r, u + row * r, r);
      kernels.reduce(tile, from(v, row, 0), r, partial + column, x.columns);
    });
  });
}

void transpose(const float* from, int64_t r, int64_t c, float scale, float* to, int64_t stride) {
  constexpr int64_t kBlock = 64;  // rows of `from` that stay in L1 while their columns are written
  for (int64_t first = 0; first < r; first += kBlock)
    for (int64_t j = 0; j < c; ++j)
      for (int64_t i = first; i < std::min(r, first + kBlock); ++i)
        to[j * stride + i] = scale * from[i * c + j];
}

}  // namespace reslora::thin
