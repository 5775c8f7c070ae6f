// Threads, tiles and the choice of an instruction set for the products of thin_kernels.h.
#include "cpu/thin_products.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace reslora::thin {
namespace {

// A tile of 48 rows (whole blocks of every kernel) x 1024 columns: 192 KiB, a fraction of L2.
constexpr int64_t kTileRows = 48;
constexpr int64_t kTileColumns = 1024;
constexpr int64_t kShareRows = 24;            // threads share multiples of it: whole blocks again
constexpr int64_t kShareColumns = 96;         // the same for columns; whole bytes of bits
constexpr int64_t kSumRows = 96 * kTileRows;  // added up apart: long sums in fp32 lose digits
constexpr int64_t kThreadWork = 256 * 1024;   // multiply-adds below which a thread is not worth it

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

/// How threads share x: by its rows, or where these are few by its columns.
struct Split {
  int64_t shares;
  bool by_columns;
};

/// On how many threads so many multiply-adds should run.
int64_t threads_for(int64_t work) {
  return std::clamp<int64_t>(work / kThreadWork, 1, at::get_num_threads());
}

Split split_of(const Tile& x, int64_t r) {
  const int64_t worth = threads_for(x.rows * x.columns * r);
  const int64_t rows = (x.rows + kShareRows - 1) / kShareRows;
  const int64_t columns = (x.columns + kShareColumns - 1) / kShareColumns;
  const bool by_columns = rows < 2 * worth && columns > rows;
  return {std::max<int64_t>(1, std::min(worth, by_columns ? columns : rows)), by_columns};
}

/// Calls body(share, first, size) for shares of `size` rows or columns in whole units.
template <typename Body>
void for_shares(int64_t size, int64_t unit, int64_t shares, const Body& body) {
  const int64_t units = (size + unit - 1) / unit;
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = units * share / shares * unit;
      const int64_t last = std::min(size, units * (share + 1) / shares * unit);
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

/// p = the sum over shares of x's rows of what `body(first row, rows, partial)` adds to a zeroed
/// partial.
template <typename Body>
void reduce_over_rows(const Tile& x, int64_t r, int64_t shares, float* p, const Body& body) {
  const int64_t size = r * x.columns;
  std::vector<float> others((shares - 1) * size);  // zeros
  std::fill(p, p + size, 0.0f);
  for_shares(x.rows, kShareRows, shares, [&](int64_t share, int64_t first, int64_t rows) {
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

/// Few rows: u = the sum over shares of x's columns of what `body(share, first column, columns,
/// partial)` adds to a zeroed partial.
template <typename Body>
void reduce_over_columns(const Tile& x, int64_t r, int64_t shares, float* u, const Body& body) {
  const int64_t size = x.rows * r;
  std::vector<float> others((shares - 1) * size);  // zeros
  std::fill(u, u + size, 0.0f);
  for_shares(x.columns, kShareColumns, shares, [&](int64_t share, int64_t first, int64_t columns) {
    body(share, first, columns, share == 0 ? u : others.data() + (share - 1) * size);
  });
  for (int64_t share = 1; share < shares; ++share) add(others.data() + (share - 1) * size, size, u);
}

/// Four rows of four floats, transposed in registers.
void transpose_quads(const float* from, int64_t c, float scale, float* to, int64_t stride) {
  using Quad = float __attribute__((vector_size(16)));
  Quad rows[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&rows[i], from + i * c, sizeof(Quad));
    rows[i] *= scale;
  }
  const Quad low01 = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Quad high01 = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Quad low23 = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Quad high23 = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  const Quad columns[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                           __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                           __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                           __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (int j = 0; j < 4; ++j) std::memcpy(to + j * stride, &columns[j], sizeof(Quad));
}

}  // namespace

const Kernels& best_kernels() {
  static const Kernels& best = *supported_kernels().front();
  return best;
}

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

void for_parts(int64_t size, int64_t unit, int64_t work,
               const std::function<void(int64_t, int64_t)>& body) {
  const int64_t units = (size + unit - 1) / unit, shares = std::min(units, threads_for(work));
  for_shares(size, unit, shares, [&](int64_t, int64_t first, int64_t n) { body(first, n); });
}

void project(const Tile& x, Rows p, int64_t r, float* u, double* squares) {
  const Kernels& kernels = best_kernels();
  const Split split = split_of(x, r);
  std::vector<double> sums(split.shares, 0.0);
  if (split.by_columns) {
    reduce_over_columns(
        x, r, split.shares, u, [&](int64_t share, int64_t first, int64_t columns, float* part) {
          for_tiles(part_of(x, 0, x.rows, first, columns), 0, x.rows,
                    [&](const Tile& tile, int64_t row, int64_t column) {
                      kernels.project(tile, from(p, 0, first + column), r, part + row * r, r);
                      if (squares) sums[share] += kernels.sum_of_squares(tile);
                    });
        });
  } else {
    for_shares(x.rows, kShareRows, split.shares, [&](int64_t share, int64_t first, int64_t rows) {
      std::fill(u + first * r, u + (first + rows) * r, 0.0f);
      for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
        kernels.project(tile, from(p, 0, column), r, u + row * r, r);
        if (squares) sums[share] += kernels.sum_of_squares(tile);
      });
    });
  }
  if (!squares) return;
  *squares = 0;
  for (const double sum : sums) *squares += sum;
}

void expand(const Tile& out, Rows u, Rows p, int64_t r, Rows base) {
  const Kernels& kernels = best_kernels();
  const Split split = split_of(out, r);
  const int64_t size = split.by_columns ? out.columns : out.rows;
  const int64_t unit = split.by_columns ? kShareColumns : kShareRows;
  for_shares(size, unit, split.shares, [&](int64_t, int64_t first, int64_t count) {
    if (split.by_columns) {
      kernels.expand(part_of(out, 0, out.rows, first, count), u, from(p, 0, first), r,
                     from(base, 0, first));
    } else {
      kernels.expand(part_of(out, first, count, 0, out.columns), from(u, first, 0), p, r,
                     from(base, first, 0));
    }
  });
}

void reduce(const Tile& x, Rows u, int64_t r, float* p) {
  const Kernels& kernels = best_kernels();
  const Split split = split_of(x, r);
  if (split.by_columns) {
    std::fill(p, p + r * x.columns, 0.0f);
    for_shares(x.columns, kShareColumns, split.shares, [&](int64_t, int64_t first, int64_t count) {
      kernels.reduce(part_of(x, 0, x.rows, first, count), u, r, p + first, x.columns);
    });
    return;
  }
  reduce_over_rows(x, r, split.shares, p, [&](int64_t first, int64_t rows, float* partial) {
    for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
      kernels.reduce(tile, from(u, row, 0), r, partial + column, x.columns);
    });
  });
}

void project_and_reduce(const Tile& x, Rows p, Rows v, int64_t r, float* u, float* q) {
  const Kernels& kernels = best_kernels();
  const Split split = split_of(x, r);
  if (split.by_columns) {
    std::fill(q, q + r * x.columns, 0.0f);
    reduce_over_columns(x, r, split.shares, u,
                        [&](int64_t, int64_t first, int64_t columns, float* part) {
                          const Tile share = part_of(x, 0, x.rows, first, columns);
                          kernels.project(share, from(p, 0, first), r, part, r);
                          kernels.reduce(share, v, r, q + first, x.columns);
                        });
    return;
  }
  reduce_over_rows(x, r, split.shares, q, [&](int64_t first, int64_t rows, float* partial) {
    std::fill(u + first * r, u + (first + rows) * r, 0.0f);
    for_tiles(x, first, rows, [&](const Tile& tile, int64_t row, int64_t column) {
      kernels.project(tile, from(p, 0, column), r, u + row * r, r);
      kernels.reduce(tile, from(v, row, 0), r, partial + column, x.columns);
    });
  });
}

double sum_of_squares_bf16(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns) {
  const int64_t shares = std::min<int64_t>(std::max<int64_t>(1, rows), threads_for(rows * columns));
  std::vector<double> sums(shares, 0.0);
  for_shares(rows, 1, shares, [&](int64_t share, int64_t first, int64_t count) {
    sums[share] = best_kernels().sum_of_squares_bf16(x + first * stride, stride, count, columns);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

void transpose(const float* from, int64_t r, int64_t c, float scale, float* to, int64_t stride) {
  constexpr int64_t kBlock = 64;  // rows of `from` that stay in L1 while their columns are written
  for (int64_t first = 0; first < r; first += kBlock) {
    const int64_t last = std::min(r, first + kBlock);
    for (int64_t j = 0; j < c; j += 4) {
      int64_t i = first;
      for (; j + 4 <= c && i + 4 <= last; i += 4)
        transpose_quads(from + i * c + j, c, scale, to + j * stride + i, stride);
      for (; i < last; ++i)
        for (int64_t k = j; k < std::min(c, j + 4); ++k)
          to[k * stride + i] = scale * from[i * c + k];
    }
  }
}

}  // namespace reslora::thin
