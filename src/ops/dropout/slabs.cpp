// Dropout in slabs: a few rows of x at a time are masked into a buffer in cache.
#include "ops/dropout/slabs.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "ops/adapt_kernels.h"
#include "ops/dropout/bit_lanes.h"

namespace reslora::ops {
namespace {

using at::Tensor;

constexpr int64_t kSlabBytes = 512 * 1024;  // half of a usual L2 cache
constexpr int64_t kGrainBytes = 64 * 1024;  // below this a second thread costs more than it saves

/// Rows per slab: what fits in cache, and at most a thread's share where sharing pays.
int64_t slab_rows(const Tensor& x) {
  const int64_t row_bytes = std::max<int64_t>(1, x.size(1) * x.element_size());
  const int64_t threads = x.size(0) * row_bytes < 2 * kGrainBytes ? 1 : at::get_num_threads();
  const int64_t share = (x.size(0) + threads - 1) / threads;
  return std::max<int64_t>(1, std::min(share, std::max<int64_t>(16, kSlabBytes / row_bytes)));
}

/// target rows = source rows with dropped elements set to 0; both row-major, the same rows.
void apply_bits(const Tensor& source, const Tensor& bits, Tensor& target) {
  const auto* in = static_cast<const char*>(source.const_data_ptr());
  auto* out = static_cast<char*>(target.mutable_data_ptr());
  const auto* mask = bits.const_data_ptr<uint8_t>();
  const int64_t n = source.size(1), size = source.element_size();
  for (int64_t row = 0; row < source.size(0); ++row)
    apply_bit_row(mask + row * bits.size(1), in + row * source.stride(0) * size, n, size,
                  out + row * target.stride(0) * size);
}

/// Calls body(first, rows) for each slab of x's rows in [begin, end); inside a parallel region,
/// where the GEMMs of a slab run on one thread and nothing may be recorded for autograd.
template <typename Body>
void for_slabs(int64_t begin, int64_t end, int64_t step, const Body& body) {
  at::AutoDispatchBelowADInplaceOrView guard;
  for (int64_t first = begin; first < end; first += step) body(first, std::min(step, end - first));
}

/// Runs body(begin, end) on shares of the rows that are whole slabs.
template <typename Body>
void parallel_over_slabs(int64_t rows, int64_t step, const Body& body) {
  at::parallel_for(0, (rows + step - 1) / step, 1, [&](int64_t first, int64_t last) {
    body(first * step, std::min(rows, last * step));
  });
}

/// The sum over one share of the rows, in fp32 at least, so that bf16 rounds once.
Tensor partial_grad(const Tensor& du, const Tensor& x, const Tensor& bits, double alpha,
                    int64_t begin, int64_t end) {
  const int64_t step = slab_rows(x);
  const auto dtype = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor sum, buffer;
  for_slabs(begin, end, step, [&](int64_t first, int64_t rows) {
    if (!buffer.defined()) {
      sum = at::zeros({du.size(1), x.size(1)}, x.options().dtype(dtype));
      buffer = at::empty({step, x.size(1)}, x.options());
    }
    Tensor dropped = buffer.narrow(0, 0, rows);
    apply_bits(x.narrow(0, first, rows), bits.narrow(0, first, rows), dropped);
    const Tensor part = du.narrow(0, first, rows).t();
    if (dtype == x.scalar_type()) {
      sum.addmm_(part, dropped, 1, alpha);
    } else {
      sum.add_(at::mm(part, dropped), alpha);
    }
  });
  return sum;
}

}  // namespace

void project_slabs(const Tensor& x, const Tensor& bits, const Tensor& A, double alpha,
                   Tensor& out) {
  const Tensor At = A.t(), rows_of = with_dense_rows(x);
  const int64_t step = slab_rows(x);
  parallel_over_slabs(x.size(0), step, [&](int64_t begin, int64_t end) {
    Tensor buffer;
    for_slabs(begin, end, step, [&](int64_t first, int64_t rows) {
      if (!buffer.defined()) buffer = at::empty({step, x.size(1)}, x.options());
      Tensor dropped = buffer.narrow(0, 0, rows);
      apply_bits(rows_of.narrow(0, first, rows), bits.narrow(0, first, rows), dropped);
      out.narrow(0, first, rows).addmm_(dropped, At, 0, alpha);
    });
  });
}

Tensor project_grad_slabs(const Tensor& du, const Tensor& x, const Tensor& bits, double alpha) {
  // One partial sum per thread, added in order: the same bits for the same number of threads.
  const Tensor rows_of = with_dense_rows(x);
  const int64_t step = slab_rows(x);
  const int64_t slabs = (x.size(0) + step - 1) / step;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), slabs);
  if (shares == 0) return at::zeros({du.size(1), x.size(1)}, x.options());
  std::vector<Tensor> sums(shares);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share)
      sums[share] = partial_grad(du, rows_of, bits, alpha, slabs * share / shares * step,
                                 std::min(x.size(0), slabs * (share + 1) / shares * step));
  });
  for (int64_t share = 1; share < shares; ++share) sums[0].add_(sums[share]);
  return sums[0];
}

void expand_slabs(const Tensor& du, const Tensor& A, const Tensor& bits, double alpha, Tensor& dx) {
  const int64_t step = slab_rows(dx);
  parallel_over_slabs(dx.size(0), step, [&](int64_t begin, int64_t end) {
    for_slabs(begin, end, step, [&](int64_t first, int64_t rows) {
      Tensor slab = dx.narrow(0, first, rows);
      slab.addmm_(du.narrow(0, first, rows), A, 0, alpha);
      apply_bits(slab, bits.narrow(0, first, rows), slab);
    });
  });
}

}  // namespace reslora::ops
