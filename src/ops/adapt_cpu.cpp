// `adapt` on the CPU: ATen's GEMMs, with dropout applied to slabs of rows that stay in cache.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "detail/check.h"
#include "ops/adapt_kernels.h"
#include "ops/dropout_bits.h"

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

Tensor draw_bits(const Tensor& x, double keep) {
  uint64_t seed = 0;
  {
    auto* generator = at::get_generator_or_default<at::CPUGeneratorImpl>(
        std::nullopt, at::detail::getDefaultCPUGenerator());
    std::lock_guard<std::mutex> lock(generator->mutex_);
    seed = generator->random64();
  }
  const int64_t row_bytes = (x.size(1) + 7) / 8;
  Tensor bits = at::empty({x.size(0), row_bytes}, x.options().dtype(at::kByte));
  auto* data = bits.data_ptr<uint8_t>();
  const auto level = static_cast<uint32_t>(keep * 65536.0 + 0.5);
  const int64_t bytes = bits.numel();
  at::parallel_for(
      0, (bytes + kBitBlockBytes - 1) / kBitBlockBytes, /*grain_size=*/32,
      [&](int64_t first, int64_t last) { draw_bit_blocks(seed, level, first, last, bytes, data); });
  return bits;
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

/// A view of x whose rows are dense.
Tensor dense_rows(const Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

void project(const Tensor& x, const Tensor& bits, const Tensor& A, double keep, Tensor& out) {
  const Tensor At = A.t(), rows_of = dense_rows(x);
  const int64_t step = slab_rows(x);
  parallel_over_slabs(x.size(0), step, [&](int64_t begin, int64_t end) {
    Tensor buffer;
    for_slabs(begin, end, step, [&](int64_t first, int64_t rows) {
      if (!buffer.defined()) buffer = at::empty({step, x.size(1)}, x.options());
      Tensor dropped = buffer.narrow(0, 0, rows);
      apply_bits(rows_of.narrow(0, first, rows), bits.narrow(0, first, rows), dropped);
      out.narrow(0, first, rows).addmm_(dropped, At, 0, 1 / keep);
    });
  });
}

/// The sum over one share of the rows, in fp32 at least, so that bf16 rounds once.
Tensor partial_grad(const Tensor& du, const Tensor& x, const Tensor& bits, double keep,
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
      sum.addmm_(part, dropped, 1, 1 / keep);
    } else {
      sum.add_(at::mm(part, dropped), 1 / keep);
    }
  });
  return sum;
}

Tensor project_grad(const Tensor& du, const Tensor& x, const Tensor& bits, double keep) {
  // One partial sum per thread, added in order: the same bits for the same number of threads.
  const Tensor rows_of = dense_rows(x);
  const int64_t step = slab_rows(x);
  const int64_t slabs = (x.size(0) + step - 1) / step;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), slabs);
  if (shares == 0) return at::zeros({du.size(1), x.size(1)}, x.options());
  std::vector<Tensor> sums(shares);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t share = first; share < last; ++share)
      sums[share] = partial_grad(du, rows_of, bits, keep, slabs * share / shares * step,
                                 std::min(x.size(0), slabs * (share + 1) / shares * step));
  });
  for (int64_t share = 1; share < shares; ++share) sums[0].add_(sums[share]);
  return sums[0];
}

void expand(const Tensor& du, const Tensor& A, const Tensor& bits, double keep, Tensor& dx) {
  const int64_t step = slab_rows(dx);
  parallel_over_slabs(dx.size(0), step, [&](int64_t begin, int64_t end) {
    for_slabs(begin, end, step, [&](int64_t first, int64_t rows) {
      Tensor slab = dx.narrow(0, first, rows);
      slab.addmm_(du.narrow(0, first, rows), A, 0, 1 / keep);
      apply_bits(slab, bits.narrow(0, first, rows), slab);
    });
  });
}

void record_norms_cpu(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
  const int64_t size = ring.size(1);
  auto* written = count.mutable_data_ptr<int64_t>();
  auto* columns = ring.mutable_data_ptr<float>();
  const auto* values = norms.const_data_ptr<float>();
  const int64_t column = *written % size;
  columns[column] = values[0];
  columns[size + column] = values[1];
  ++*written;
}

/// RESLORA_KERNELS=aten takes the form that other devices use (for tests and comparisons); auto,
/// the default, takes the kernels of this file.
const DeviceKernels& chosen_kernels() {
  static const DeviceKernels& chosen = []() -> const DeviceKernels& {
    const char* name = std::getenv("RESLORA_KERNELS");
    const std::string_view choice = name ? name : "auto";
    RESLORA_CHECK(choice == "auto" || choice == "aten",
                  "[adapt] RESLORA_KERNELS must be auto or aten; got {}", choice);
    return choice == "aten" ? kAtenKernels : kCpuKernels;
  }();
  return chosen;
}

Outputs adapt_cpu(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                  const OptTensor& base_out, at::TensorList A, at::TensorList B,
                  at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                  const OptTensor& bits, bool keep_tap, bool want_norms) {
  return evaluate(
      {x, weight, bias, base_out, A, B, scaling, taps, dropout, bits, keep_tap, want_norms},
      chosen_kernels());
}

Gradients adapt_backward_cpu(const OptTensor& gy, const OptTensor& gs, const OptTensor& gtap,
                             const Tensor& x, const OptTensor& weight, at::TensorList A,
                             at::TensorList B, at::ArrayRef<double> scaling, const Tensor& s,
                             const OptTensor& bits, double dropout, bool keep_tap,
                             std::array<bool, 3> needs) {
  return evaluate_backward(
      {gy, gs, gtap, x, weight, A, B, scaling, s, bits, dropout, keep_tap, needs},
      chosen_kernels());
}

}  // namespace

const DeviceKernels kCpuKernels = {draw_bits, project, project_grad, expand};

TORCH_LIBRARY_IMPL(reslora, CPU, m) {
  m.impl("adapt", adapt_cpu);
  m.impl("adapt_backward", adapt_backward_cpu);
  m.impl("record_norms", record_norms_cpu);
}

}  // namespace reslora::ops
