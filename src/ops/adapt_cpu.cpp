// `adapt` on the CPU: in fp32 the products of thin_products.h; in other types ATen's GEMMs and
// dropout in slabs.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/thin_products.h"
#include "ops/adapt_kernels.h"
#include "ops/cpu_taps.h"
#include "ops/dropout/draw.h"
#include "ops/dropout/slabs.h"
#include "ops/kernel_choice.h"

namespace reslora::ops {
namespace {

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

/// A gradient in the dtype and on the device of its block.
Tensor for_block(Tensor grad, const Tensor& block) {
  return is_plain(block) ? grad : grad.to(block.options());
}

/// Up to so many rows the blocks of A and B are read as they lie: stacking or transposing them
/// would cost as much as the products do.
constexpr int64_t kFewRows = 16;
constexpr int64_t kUnit = 16;  // rows or columns of a block that threads share: whole vectors

bool is_few(const Tensor& rows) { return rows.size(0) <= kFewRows; }

// The kernels for few rows: threads share what the product does not sum over.

void project_few(const thin::Tile& x, thin::Rows p, int64_t r, float* u, int64_t stride) {
  thin::for_parts(r, kUnit, x.rows * x.columns * r, [&](int64_t first, int64_t count) {
    thin::best_kernels().project(x, {p.data + first * p.stride, p.stride}, count, u + first,
                                 stride);
  });
}

void expand_few(const thin::Tile& out, thin::Rows u, thin::Rows p, int64_t r, thin::Rows base) {
  thin::for_parts(out.columns, kUnit, out.rows * out.columns * r, [&](int64_t j, int64_t count) {
    const thin::Tile part = {out.data + j,   out.stride, out.bits ? out.bits + j / 8 : nullptr,
                             out.bit_stride, out.rows,   count};
    const thin::Rows below = {base.data ? base.data + j : nullptr, base.stride};
    thin::best_kernels().expand(part, u, {p.data + j, p.stride}, r, below);
  });
}

void reduce_few(const thin::Tile& x, thin::Rows u, int64_t r, float* p, int64_t stride) {
  thin::for_parts(r, kUnit, x.rows * x.columns * r, [&](int64_t first, int64_t count) {
    thin::best_kernels().reduce(x, {u.data + first, u.stride}, count, p + first * stride, stride);
  });
}

/// `stack` of rows for fp32, in one copy.
Tensor stack_rows(at::TensorList A, const Tensor& like) {
  if (A.size() == 1) return plain(A[0], like);
  Tensor stacked = at::empty({total_size(A, 0), A[0].size(1)}, like.options());
  float* to = stacked.mutable_data_ptr<float>();
  for (const Tensor& block : A) {
    const Tensor dense = plain(block, like);
    to = std::copy_n(dense.const_data_ptr<float>(), dense.numel(), to);
  }
  return stacked;
}

/// B^T [R, out] with the scaling.
Tensor stack_columns(at::TensorList B, at::ArrayRef<double> scaling, const Tensor& like) {
  Tensor Bt = at::empty({total_size(B, 1), B[0].size(0)}, like.options());
  float* rows = Bt.mutable_data_ptr<float>();
  for (size_t k = 0; k < B.size(); ++k) {
    const Tensor block = plain(B[k], like);
    thin::transpose(block.const_data_ptr<float>(), block.size(0), block.size(1),
                    static_cast<float>(scaling[k]), rows, Bt.size(1));
    rows += block.size(1) * Bt.size(1);
  }
  return Bt;
}

/// Columns of t from `first` on.
thin::Rows columns_of(const Tensor& t, int64_t first) {
  return {t.const_data_ptr<float>() + first, t.stride(0)};
}

thin::Tile columns_tile(const Tensor& t, int64_t first, int64_t count) {
  return {const_cast<float*>(t.const_data_ptr<float>()) + first,
          t.stride(0),
          nullptr,
          0,
          t.size(0),
          count};
}

/// norms_of where |x|_F^2 is known already; u is fp32.
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

/// norms_of without ATen's reduction where x is bfloat16, which takes a third of the GEMM's time.
Tensor norms_with_bf16(const Tensor& x, const Tensor& u, at::ArrayRef<Range> own) {
  if (x.scalar_type() != at::kBFloat16 || x.stride(1) != 1) return norms_of(x, u, own);
  const auto* numbers = static_cast<const uint16_t*>(x.const_data_ptr());
  const double squares = thin::sum_of_squares_bf16(numbers, x.stride(0), x.size(0), x.size(1));
  return norms_from(squares, u.to(at::kFloat), own);
}

/// Types other than fp32: ATen's products, with dropout in slabs.
Tensor project_with_aten(const Tensor& x, Mask& mask, at::TensorList A, at::ArrayRef<Range> own,
                         Tensor* norms) {
  Tensor u;
  if (mask.is_on) {
    const Tensor stacked = stack(A, 0, x);
    u = at::empty({x.size(0), stacked.size(0)}, x.options());
    project_slabs(x, mask.bits, stacked, 1 / mask.keep, u);
  } else {
    u = kAtenKernels.project(x, mask, A, own, nullptr);
  }
  if (norms) *norms = norms_with_bf16(x, u, own);
  return u;
}

Tensor project_back_with_aten(const Tensor& du, at::TensorList A, const Mask& mask) {
  if (!mask.is_on) return kAtenKernels.project_back(du, A, mask);
  Tensor out = at::empty({du.size(0), A[0].size(1)}, du.options());
  expand_slabs(du, stack(A, 0, du), mask.bits, 1 / mask.keep, out);
  return out;
}

Tensor project(const Tensor& x, Mask& mask, at::TensorList A, at::ArrayRef<Range> own,
               Tensor* norms) {
  if (mask.is_on && !mask.bits.defined()) mask.bits = draw_bits(x, mask.keep);
  if (!is_thin(x)) return project_with_aten(x, mask, A, own, norms);
  const int64_t R = total_size(A, 0);
  Tensor u = at::empty({x.size(0), R}, x.options());
  auto* to = u.mutable_data_ptr<float>();
  const auto tile = tile_of(x, mask.pointer());
  double squares = 0;
  if (is_few(x)) {
    std::fill_n(to, u.numel(), 0.0f);
    for (const Tensor& block : A) {
      project_few(tile, rows_of(plain(block, x)), block.size(0), to, R);
      to += block.size(0);
    }
    if (norms) squares = thin::best_kernels().sum_of_squares(tile);
  } else {
    const Tensor stacked = stack_rows(A, x);
    thin::project(tile, rows_of(stacked), R, to, norms ? &squares : nullptr);
  }
  if (mask.is_on) u.mul_(1 / mask.keep);
  if (norms) *norms = norms_from(squares, u, own);
  return u;
}

/// factor * the columns of t [T, .] from `first` on, dense [T, count].
std::vector<float> scaled_columns(const Tensor& t, int64_t first, int64_t count, double factor) {
  std::vector<float> out(t.size(0) * count);
  const thin::Rows from = columns_of(t, first);
  for (int64_t i = 0; i < t.size(0); ++i)
    for (int64_t j = 0; j < count; ++j)
      out[i * count + j] = static_cast<float>(factor) * from.data[i * from.stride + j];
  return out;
}

/// base [out] or [T, out] as rows; null where there is none.
thin::Rows base_rows(const Tensor& base) {
  if (!base.defined()) return {nullptr, 0};
  return {base.const_data_ptr<float>(), base.dim() == 1 ? 0 : base.stride(0)};
}

/// out = base, or 0.
void fill_with(const thin::Rows& base, Tensor& out) {
  auto* to = out.mutable_data_ptr<float>();
  const int64_t n = out.size(1);
  for (int64_t i = 0; i < out.size(0); ++i, to += n) {
    if (base.data) {
      std::copy_n(base.data + i * base.stride, n, to);
    } else {
      std::fill_n(to, n, 0.0f);
    }
  }
}

Tensor expand(const Tensor& s, at::TensorList B, at::ArrayRef<double> scaling, const Tensor* base) {
  if (s.scalar_type() != at::kFloat) return kAtenKernels.expand(s, B, scaling, base);
  const Tensor rows = with_dense_rows(s), below = base ? with_dense_rows(*base) : Tensor();
  Tensor out = at::empty({s.size(0), B[0].size(0)}, s.options());
  if (!is_few(s)) {
    const Tensor Bt = stack_columns(B, scaling, s);
    thin::expand(tile_of(out, nullptr), rows_of(rows), rows_of(Bt), Bt.size(0), base_rows(below));
    return out;
  }
  // Rows of B stand for columns of B^T: y += (scaling_k s_k) B_k^T is a projection of s_k.
  fill_with(base_rows(below), out);
  int64_t first = 0;
  for (size_t k = 0; k < B.size(); ++k) {
    const int64_t r = B[k].size(1);
    std::vector<float> own = scaled_columns(rows, first, r, scaling[k]);
    project_few({own.data(), r, nullptr, 0, s.size(0), r}, rows_of(plain(B[k], s)), out.size(1),
                out.mutable_data_ptr<float>(), out.size(1));
    first += r;
  }
  return out;
}

Tensor project_back(const Tensor& du, at::TensorList A, const Mask& mask) {
  if (du.scalar_type() != at::kFloat) return project_back_with_aten(du, A, mask);
  const Tensor rows = with_dense_rows(mask.is_on ? du.mul(1 / mask.keep) : du);
  Tensor out = at::empty({du.size(0), A[0].size(1)}, du.options());
  const auto tile = tile_of(out, mask.pointer());
  if (!is_few(du)) {
    const Tensor stacked = stack_rows(A, du);
    thin::expand(tile, rows_of(rows), rows_of(stacked), stacked.size(0), {nullptr, 0});
    return out;
  }
  int64_t first = 0;
  for (const Tensor& block : A) {  // onto what the blocks before have left
    const thin::Rows base = {first == 0 ? nullptr : tile.data, tile.stride};
    expand_few(tile, columns_of(rows, first), rows_of(plain(block, du)), block.size(0), base);
    first += block.size(0);
  }
  return out;
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  if (!is_thin(x)) {
    return mask.is_on ? unstack(project_grad_slabs(du, x, mask.bits, 1 / mask.keep), A, 0)
                      : kAtenKernels.project_grad(du, x, mask, A);
  }
  const Tensor rows = with_dense_rows(mask.is_on ? du.mul(1 / mask.keep) : du);
  const auto tile = tile_of(x, mask.pointer());
  std::vector<Tensor> dA;
  if (is_few(x)) {
    int64_t first = 0;
    for (const Tensor& A_k : A) {
      Tensor block = at::empty(A_k.sizes(), x.options());
      auto* to = block.mutable_data_ptr<float>();
      std::fill_n(to, block.numel(), 0.0f);
      reduce_few(tile, columns_of(rows, first), A_k.size(0), to, x.size(1));
      first += A_k.size(0);
      dA.push_back(for_block(std::move(block), A_k));
    }
    return dA;
  }
  Tensor stacked = at::empty({du.size(1), x.size(1)}, x.options());
  thin::reduce(tile, rows_of(rows), du.size(1), stacked.mutable_data_ptr<float>());
  if (A.size() == 1) return {for_block(std::move(stacked), A[0])};
  const float* from = stacked.const_data_ptr<float>();
  for (const Tensor& A_k : A) {
    Tensor block = at::empty(A_k.sizes(), x.options());
    std::copy_n(from, block.numel(), block.mutable_data_ptr<float>());
    from += block.numel();
    dA.push_back(for_block(std::move(block), A_k));
  }
  return dA;
}

/// products_of_gy for few rows: B and dB as they lie.
std::pair<Tensor, std::vector<Tensor>> products_of_few(const Tensor& gy, at::TensorList B,
                                                       at::ArrayRef<double> scaling,
                                                       const Tensor* s) {
  const int64_t R = total_size(B, 1);
  int64_t first = 0;
  const Tensor rows = with_dense_rows(gy);
  const Tensor entered = s ? with_dense_rows(*s) : Tensor();
  Tensor ds = at::empty({gy.size(0), R}, gy.options());
  auto* own_ds = ds.mutable_data_ptr<float>();
  std::vector<Tensor> dB;
  for (size_t k = 0; k < B.size(); ++k) {
    const int64_t r = B[k].size(1);
    expand_few(columns_tile(ds, first, r), rows_of(rows), rows_of(plain(B[k], gy)), gy.size(1),
               {nullptr, 0});
    const auto factor = static_cast<float>(scaling[k]);
    for (int64_t i = 0; i < ds.size(0); ++i)
      for (int64_t j = 0; j < r; ++j) own_ds[i * R + first + j] *= factor;
    if (s) {
      std::vector<float> own = scaled_columns(entered, first, r, factor);
      Tensor block = at::empty({gy.size(1), r}, gy.options());
      auto* to = block.mutable_data_ptr<float>();
      std::fill_n(to, block.numel(), 0.0f);
      reduce_few({own.data(), r, nullptr, 0, gy.size(0), r}, rows_of(rows), gy.size(1), to, r);
      dB.push_back(for_block(std::move(block), B[k]));
    }
    first += r;
  }
  return {ds, std::move(dB)};
}

/// ds without gs, and a gradient for each block of B where s is given.
std::pair<Tensor, std::vector<Tensor>> products_of_gy(const Tensor& gy, at::TensorList B,
                                                      at::ArrayRef<double> scaling,
                                                      const Tensor* s) {
  if (is_few(gy)) return products_of_few(gy, B, scaling, s);
  const Tensor rows = with_dense_rows(gy), Bt = stack_columns(B, scaling, gy);
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

std::pair<Tensor, std::vector<Tensor>> expand_grad(const MemberGrads& member, bool needs_dB,
                                                   const Tensor* du) {
  if (!member.gy || member.gy->scalar_type() != at::kFloat)
    return kAtenKernels.expand_grad(member, needs_dB, du);
  const Tensor gy = as_matrix(*member.gy), s = as_matrix(*member.s);
  auto grads = products_of_gy(gy, member.B, member.scaling, needs_dB ? &s : nullptr);
  if (member.gs) add_in_fp32(grads.first, *member.gs);
  if (du) write_du_in_fp32(member, grads.first, *du);
  return grads;
}

/// The kernels of this file, unless RESLORA_KERNELS=aten asks for the form that other devices use.
const DeviceKernels& chosen_kernels(const Tensor&) {
  return kernel_policy() == KernelPolicy::kAten ? kAtenKernels : kCpuKernels;
}

std::string kernels_on_cpu(const Tensor& x) {
  if (&chosen_kernels(x) == &kAtenKernels) return "ATen's form (RESLORA_KERNELS=aten)";
  return fmt::format("reslora's own (RESLORA_KERNELS={})",
                     kernel_policy() == KernelPolicy::kFused ? "fused" : "auto");
}

}  // namespace

const DeviceKernels kCpuKernels = {project,     take_taps_on_cpu, expand,
                                   expand_grad, project_grad,     project_back};

TORCH_LIBRARY_IMPL(reslora, CPU, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_with<chosen_kernels>);
  m.impl("adapt_backward", adapt_backward_with<chosen_kernels>);
  m.impl("kernels_of", kernels_on_cpu);
}

}  // namespace reslora::ops
