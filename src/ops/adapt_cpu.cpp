// `adapt` on the CPU: in fp32 the products of thin_products.h; in other types ATen's GEMMs, with
// dropout applied to slabs of rows that stay in cache.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "detail/check.h"
#include "ops/adapt_kernels.h"
#include "ops/dropout_bits.h"
#include "ops/thin_products.h"

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

void project_slabs(const Tensor& x, const Tensor& bits, const Tensor& A, double alpha,
                   Tensor& out) {
  const Tensor At = A.t(), rows_of = dense_rows(x);
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

Tensor project_grad_slabs(const Tensor& du, const Tensor& x, const Tensor& bits, double alpha) {
  // One partial sum per thread, added in order: the same bits for the same number of threads.
  const Tensor rows_of = dense_rows(x);
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

// ---- The thin products, for fp32 ---------------------------------------------------------------

bool is_thin(const Tensor& x) { return x.scalar_type() == at::kFloat && x.stride(1) == 1; }

thin::Tile tile_of(const Tensor& x, const Tensor* bits) {
  return {const_cast<float*>(x.const_data_ptr<float>()),
          x.stride(0),
          bits ? bits->const_data_ptr<uint8_t>() : nullptr,
          bits ? bits->size(1) : 0,
          x.size(0),
          x.size(1)};
}

thin::Rows rows_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0)}; }

/// B is kept as the transpose of a dense [R, out] that has the scaling.
Stacked stack(at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
              const Tensor& like) {
  if (like.scalar_type() != at::kFloat) return kAtenKernels.stack(A, B, scaling, like);
  int64_t R = 0;
  for (const Tensor& block : B) R += block.size(1);
  Tensor Bt = at::empty({R, B[0].size(0)}, like.options());
  float* rows = Bt.mutable_data_ptr<float>();
  for (size_t k = 0; k < B.size(); ++k) {
    const Tensor block = B[k].to(like.options()).contiguous();
    thin::transpose(block.const_data_ptr<float>(), block.size(0), block.size(1),
                    static_cast<float>(scaling[k]), rows, Bt.size(1));
    rows += block.size(1) * Bt.size(1);
  }
  Tensor At = A.size() == 1 ? A[0].to(like.options()) : at::cat(A, 0).to(like.options());
  return {At.contiguous(), Bt.t(), 1.0};
}

Tensor project(const Tensor& x, const Tensor* bits, const Tensor& A, double alpha, int64_t R,
               Tensor* norms) {
  if (!is_thin(x)) {
    if (!bits) return kAtenKernels.project(x, bits, A, alpha, R, norms);
    Tensor u = at::empty({x.size(0), A.size(0)}, x.options());
    project_slabs(x, *bits, A, alpha, u);
    if (norms) *norms = norms_of(x, u, R);
    return u;
  }
  Tensor u = at::empty({x.size(0), A.size(0)}, x.options());
  double squares = 0;
  thin::project(tile_of(x, bits), rows_of(A), A.size(0), u.mutable_data_ptr<float>(),
                norms ? &squares : nullptr);
  if (alpha != 1) u.mul_(alpha);
  if (norms) {
    *norms = at::empty({2}, x.options());
    norms->mutable_data_ptr<float>()[0] = static_cast<float>(std::sqrt(squares));
    norms->mutable_data_ptr<float>()[1] = at::linalg_vector_norm(u.narrow(1, 0, R)).item<float>();
  }
  return u;
}

Tensor expand(const Tensor& u, const Tensor& P, double alpha, const Tensor* base,
              const Tensor* bits) {
  if (u.scalar_type() != at::kFloat) {
    if (!bits) return kAtenKernels.expand(u, P, alpha, base, bits);
    Tensor out = at::empty({u.size(0), P.size(1)}, u.options());
    expand_slabs(u, P, *bits, alpha, out);
    return out;
  }
  const Tensor scaled = (alpha == 1 ? u : u.mul(alpha)).contiguous();
  const Tensor rows = P.contiguous(), below = base ? base->contiguous() : Tensor();
  Tensor out = at::empty({u.size(0), P.size(1)}, u.options());
  thin::Rows start = {nullptr, 0};
  if (base) start = {below.const_data_ptr<float>(), below.dim() == 1 ? 0 : below.stride(0)};
  thin::expand(tile_of(out, bits), rows_of(scaled), rows_of(rows), rows.size(0), start);
  return out;
}

Tensor project_grad(const Tensor& du, const Tensor& x, const Tensor* bits, double alpha) {
  if (!is_thin(x)) {
    return bits ? project_grad_slabs(du, x, *bits, alpha)
                : kAtenKernels.project_grad(du, x, bits, alpha);
  }
  const Tensor rows = du.contiguous();
  Tensor dA = at::empty({du.size(1), x.size(1)}, x.options());
  thin::reduce(tile_of(x, bits), rows_of(rows), du.size(1), dA.mutable_data_ptr<float>());
  return alpha == 1 ? dA : dA.mul_(alpha);
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const Tensor& gy, const Stacked& stacked,
                                                   const BackwardArgs& args) {
  if (gy.scalar_type() != at::kFloat) return kAtenKernels.expand_grad(gy, stacked, args);
  const Tensor rows = gy.contiguous(), Bt = stacked.B.t();
  const int64_t R = Bt.size(0), out = Bt.size(1);
  Tensor ds = at::empty({gy.size(0), R}, gy.options());
  const auto tile = tile_of(rows, nullptr);
  if (!args.needs[2]) {
    thin::project(tile, rows_of(Bt), R, ds.mutable_data_ptr<float>(), nullptr);
    return {ds, {}};
  }
  const Tensor s = as_matrix(args.s).contiguous();
  Tensor dBt = at::empty({R, out}, gy.options());
  thin::project_and_reduce(tile, rows_of(Bt), rows_of(s), R, ds.mutable_data_ptr<float>(),
                           dBt.mutable_data_ptr<float>());
  std::vector<Tensor> dB;
  const float* from = dBt.const_data_ptr<float>();
  for (size_t k = 0; k < args.B.size(); ++k) {
    const int64_t r = args.B[k].size(1);
    Tensor block = at::empty({out, r}, gy.options());
    thin::transpose(from, r, out, static_cast<float>(args.scaling[k]),
                    block.mutable_data_ptr<float>(), r);
    from += r * out;
    dB.push_back(block.to(args.B[k].options()));
  }
  return {ds, std::move(dB)};
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

const DeviceKernels kCpuKernels = {stack, draw_bits, project, expand, project_grad, expand_grad};

TORCH_LIBRARY_IMPL(reslora, CPU, m) {
  m.impl("adapt", adapt_cpu);
  m.impl("adapt_backward", adapt_backward_cpu);
  m.impl("record_norms", record_norms_cpu);
}

}  // namespace reslora::ops
