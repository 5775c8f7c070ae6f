// Products of a wide matrix with a thin one on the CPU, fp32, on torch's threads.
//
// What `adapt` does beside the big GEMM reads or writes T x n matrices against r columns: bound by
// memory, so each function reads its wide matrix once, applies dropout's bits while it does, and
// fuses what else wants the same rows. Sums are taken in a fixed order for a number of threads:
// the same inputs give the same bits.
#pragma once

#include <functional>
#include <vector>

#include "cpu/thin_kernels.h"

namespace reslora::thin {

/// The instruction sets that this processor runs, fastest first; the functions below take the
/// first.
std::vector<const Kernels*> supported_kernels();

/// The first of them: for products that are too small for tiles.
const Kernels& best_kernels();

/// Calls body(first, count) for parts of `size` in whole units, on as many threads as `work`
/// multiply-adds are worth.
void for_parts(int64_t size, int64_t unit, int64_t work,
               const std::function<void(int64_t first, int64_t count)>& body);

/// u [T, r] (dense) = kept x p^T. Where `squares` is not null it becomes the sum of x^2, dropped
/// elements included.
void project(const Tile& x, Rows p, int64_t r, float* u, double* squares);

/// out = kept (base + u p); base may be null, one row for all (stride 0), or out itself.
void expand(const Tile& out, Rows u, Rows p, int64_t r, Rows base);

/// p [r, n] (dense) = u^T kept x.
void reduce(const Tile& x, Rows u, int64_t r, float* p);

/// Both at once, in one read of x: u = x p^T and q = v^T x; u [T, r], q [r, n] dense, v [T, r].
void project_and_reduce(const Tile& x, Rows p, Rows v, int64_t r, float* u, float* q);

/// The sum of squares of bfloat16 numbers x [rows, columns], rows `stride` apart.
double sum_of_squares_bf16(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns);

/// to [c, r] (row stride `stride`) = scale * from [r, c]^T, where `from` is dense.
void transpose(const float* from, int64_t r, int64_t c, float scale, float* to, int64_t stride);

}  // namespace reslora::thin
