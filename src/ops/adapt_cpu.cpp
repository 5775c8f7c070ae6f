// `adapt` on the CPU: in fp32 the products of thin_products.h; in other types ATen's GEMMs and
// dropout in slabs.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "cpu/thin_products.h"
#include "ops/adapt_kernels.h"
#include "ops/dropout_bits.h"
#include "ops/dropout_slabs.h"
#include "ops/kernel_choice.h"

namespace reslora::ops {
namespace {

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
      0, (bytes + kBitBlockBytes - 1) / kBitBlockBytes, /*grain_size=*/4,
      [&](int64_t first, int64_t last) { draw_bit_blocks(seed, level, first, last, bytes, data); });
  return bits;
}

bool is_thin(const Tensor& x) { return x.scalar_type() == at::kFloat && x.stride(1) == 1; }

thin::Tile tile_of(const Tensor& x, const Tensor* bits) {
  return {const_cast<float*>(x.const_data_ptr<float>()),
          x.stride(0),
          bits ? bits->const_data_ptr<uint8_t>() : nullptr,
          bits ? bits->size(1) : 0,
          x.size(0),
          x.size(1)};
}

/// t with dense rows: t itself, or a copy.
Tensor with_dense_rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

thin::Rows rows_of(const Tensor& t) { return {t.const_data_ptr<float>(), t.stride(0)}; }

bool is_plain(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_cpu(); }

/// t as dense fp32 on the CPU: t itself where it is that. (A call of `to` that does nothing costs
/// as much as a small product.)
Tensor plain(const Tensor& t, const Tensor& like) {
  return is_plain(t) && t.is_contiguous() ? t : t.to(like.options()).contiguous();
}

/// A gradient in the dtype and on the device of its block.
Tensor for_block(Tensor grad, const Tensor& block) {
  return is_plain(block) ? grad : grad.to(block.options());
}

/// Blocks of rows below one another: at::cat in one copy.
Tensor stack_rows(at::TensorList A, const Tensor& like) {
  if (like.scalar_type() != at::kFloat) return kAtenKernels.stack_rows(A, like).contiguous();
  if (A.size() == 1) return plain(A[0], like);
  int64_t rows = 0;
  for (const Tensor& block : A) rows += block.size(0);
  Tensor stacked = at::empty({rows, A[0].size(1)}, like.options());
  float* to = stacked.mutable_data_ptr<float>();
  for (const Tensor& block : A) {
    const Tensor dense = plain(block, like);
    to = std::copy_n(dense.const_data_ptr<float>(), dense.numel(), to);
  }
  return stacked;
}

/// B is kept as the transpose of a dense [R, out] that has the scaling.
Columns stack_columns(at::TensorList B, at::ArrayRef<double> scaling, const Tensor& like) {
  if (like.scalar_type() != at::kFloat) return kAtenKernels.stack_columns(B, scaling, like);
  int64_t R = 0;
  for (const Tensor& block : B) R += block.size(1);
  Tensor Bt = at::empty({R, B[0].size(0)}, like.options());
  float* rows = Bt.mutable_data_ptr<float>();
  for (size_t k = 0; k < B.size(); ++k) {
    const Tensor block = plain(B[k], like);
    thin::transpose(block.const_data_ptr<float>(), block.size(0), block.size(1),
                    static_cast<float>(scaling[k]), rows, Bt.size(1));
    rows += block.size(1) * Bt.size(1);
  }
  return {Bt.t(), 1.0};
}

/// norms_of where |x|_F^2 is known already.
Tensor norms_from(double squares, const Tensor& u, at::ArrayRef<Range> own) {
  Tensor norms = at::empty({2 * static_cast<int64_t>(own.size())}, u.options());
  auto* values = norms.mutable_data_ptr<float>();
  for (const Range& range : own) {
    double sum = 0;
    const float* columns = u.const_data_ptr<float>() + range.first;
    for (int64_t i = 0; i < u.size(0); ++i)
      for (int64_t k = 0; k < range.size; ++k)
        sum += columns[i * u.stride(0) + k] * columns[i * u.stride(0) + k];
    *values++ = static_cast<float>(std::sqrt(squares));
    *values++ = static_cast<float>(std::sqrt(sum));
  }
  return norms;
}

Tensor project(const Tensor& x, Mask& mask, const Tensor& A, at::ArrayRef<Range> own,
               Tensor* norms) {
  if (mask.is_on && !mask.bits.defined()) mask.bits = draw_bits(x, mask.keep);
  if (!is_thin(x)) {
    if (!mask.is_on) return kAtenKernels.project(x, mask, A, own, norms);
    Tensor u = at::empty({x.size(0), A.size(0)}, x.options());
    project_slabs(x, mask.bits, A, 1 / mask.keep, u);
    if (norms) *norms = norms_of(x, u, own);
    return u;
  }
  Tensor u = at::empty({x.size(0), A.size(0)}, x.options());
  double squares = 0;
  thin::project(tile_of(x, mask.pointer()), rows_of(A), A.size(0), u.mutable_data_ptr<float>(),
                norms ? &squares : nullptr);
  if (mask.is_on) u.mul_(1 / mask.keep);
  if (norms) *norms = norms_from(squares, u, own);
  return u;
}

std::pair<Tensor, Tensor> take_taps(const Tensor& u, at::TensorList taps, int64_t R,
                                    bool keep_tap) {
  if (u.scalar_type() != at::kFloat || (taps.empty() && u.size(1) == R))
    return kAtenKernels.take_taps(u, taps, R, keep_tap);
  const int64_t T = u.size(0), width = u.size(1), stride = u.stride(0);
  const bool has_tap_rows = width > R;
  Tensor s = at::empty({T, R}, u.options()), tap = keep_tap ? u : Tensor();
  if (has_tap_rows) tap = at::empty({T, width - R}, u.options());
  const float* from = u.const_data_ptr<float>();
  float* sum = s.mutable_data_ptr<float>();
  float* rest = has_tap_rows ? tap.mutable_data_ptr<float>() : nullptr;
  for (int64_t row = 0; row < T; ++row) {
    std::copy_n(from + row * stride, R, sum + row * R);
    if (rest) std::copy_n(from + row * stride + R, width - R, rest + row * (width - R));
  }
  for (const Tensor& one : taps) {
    const Tensor addend = plain(as_matrix(one), u);
    const float* values = addend.const_data_ptr<float>();
    for (int64_t i = 0; i < T * R; ++i) sum[i] += values[i];
  }
  return {s, tap};
}

Tensor expand(const Tensor& u, const Tensor& P, double alpha, const Tensor* base,
              const Tensor* bits) {
  if (u.scalar_type() != at::kFloat) {
    if (!bits) return kAtenKernels.expand(u, P, alpha, base, bits);
    Tensor out = at::empty({u.size(0), P.size(1)}, u.options());
    expand_slabs(u, P, *bits, alpha, out);
    return out;
  }
  const Tensor scaled = with_dense_rows(alpha == 1 ? u : u.mul(alpha));
  const Tensor rows = with_dense_rows(P), below = base ? with_dense_rows(*base) : Tensor();
  Tensor out = at::empty({u.size(0), P.size(1)}, u.options());
  thin::Rows start = {nullptr, 0};
  if (base) start = {below.const_data_ptr<float>(), below.dim() == 1 ? 0 : below.stride(0)};
  thin::expand(tile_of(out, bits), rows_of(scaled), rows_of(rows), rows.size(0), start);
  return out;
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  if (!is_thin(x)) {
    return mask.is_on ? unstack(project_grad_slabs(du, x, mask.bits, 1 / mask.keep), A, 0)
                      : kAtenKernels.project_grad(du, x, mask, A);
  }
  const Tensor rows = with_dense_rows(du);
  Tensor stacked = at::empty({du.size(1), x.size(1)}, x.options());
  thin::reduce(tile_of(x, mask.pointer()), rows_of(rows), du.size(1),
               stacked.mutable_data_ptr<float>());
  if (mask.is_on) stacked.mul_(1 / mask.keep);
  if (A.size() == 1) return {for_block(std::move(stacked), A[0])};
  std::vector<Tensor> dA;
  const float* from = stacked.const_data_ptr<float>();
  for (const Tensor& A_k : A) {
    Tensor block = at::empty(A_k.sizes(), x.options());
    std::copy_n(from, block.numel(), block.mutable_data_ptr<float>());
    from += block.numel();
    dA.push_back(for_block(std::move(block), A_k));
  }
  return dA;
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const Tensor& gy, const Columns& columns,
                                                   const Tensor* s, at::TensorList B,
                                                   at::ArrayRef<double> scaling) {
  if (gy.scalar_type() != at::kFloat) return kAtenKernels.expand_grad(gy, columns, s, B, scaling);
  const Tensor rows = with_dense_rows(gy), Bt = columns.B.t();
  const int64_t R = Bt.size(0), out = Bt.size(1);
  Tensor ds = at::empty({gy.size(0), R}, gy.options());
  const auto tile = tile_of(rows, nullptr);
  if (!s) {
    thin::project(tile, rows_of(Bt), R, ds.mutable_data_ptr<float>(), nullptr);
    return {ds, {}};
  }
  const Tensor entered = with_dense_rows(*s);
  Tensor dBt = at::empty({R, out}, gy.options());
  thin::project_and_reduce(tile, rows_of(Bt), rows_of(entered), R, ds.mutable_data_ptr<float>(),
                           dBt.mutable_data_ptr<float>());
  std::vector<Tensor> dB;
  const float* from = dBt.const_data_ptr<float>();
  for (size_t k = 0; k < B.size(); ++k) {
    const int64_t r = B[k].size(1);
    Tensor block = at::empty({out, r}, gy.options());
    thin::transpose(from, r, out, static_cast<float>(scaling[k]), block.mutable_data_ptr<float>(),
                    r);
    from += r * out;
    dB.push_back(for_block(std::move(block), B[k]));
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

/// The kernels of this file, unless RESLORA_KERNELS=aten asks for the form that other devices use.
const DeviceKernels& chosen_kernels(const Tensor&) {
  return kernel_policy() == KernelPolicy::kAten ? kAtenKernels : kCpuKernels;
}

}  // namespace

const DeviceKernels kCpuKernels = {stack_rows, stack_columns, project,    take_taps,
                                   expand,     project_grad,  expand_grad};

TORCH_LIBRARY_IMPL(reslora, CPU, m) {
  m.impl("adapt", adapt_with<chosen_kernels>);
  m.impl("adapt_backward", adapt_backward_with<chosen_kernels>);
  m.impl("record_norms", record_norms_cpu);
}

}  // namespace reslora::ops
