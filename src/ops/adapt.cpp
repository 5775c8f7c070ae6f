// The op `adapt` on any device, and its public C++ entry.
//
// Order that saves a pass each way (the low-rank term is written first, the big GEMM accumulates):
//   forward   u = x A^T;  s = u[:, :R] + taps;  y = bias + s B^T;  y += x W^T
//   backward  ds = gy B + gs;  dB = gy^T s;  du = [ds | gtap];  dx = du A;  dx += gy W;  dA = du^T
//   x
// The big GEMMs are ATen's; the thin products beside them are the device's (adapt_kernels.h).
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <reslora/ops.h>

#include <algorithm>
#include <cmath>

#include "ops/adapt_kernels.h"

namespace reslora {
namespace ops {
namespace {

using at::Tensor;

Tensor with_leading_dims(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = matrix.size(1);
  return matrix.view(sizes);
}

const Tensor* pointer_to(const OptTensor& t) { return t ? &*t : nullptr; }

}  // namespace

Tensor as_matrix(const Tensor& x) {
  Tensor m = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  // BLAS takes rows or columns that are dense; anything else is made dense once.
  return m.stride(1) == 1 || m.stride(0) == 1 ? m : m.contiguous();
}

bool is_uniform(at::ArrayRef<double> scaling) {
  return std::all_of(scaling.begin(), scaling.end(), [&](double s) { return s == scaling[0]; });
}

std::vector<Tensor> unstack(const Tensor& stacked, at::TensorList blocks, int64_t dim) {
  std::vector<Tensor> out;
  out.reserve(blocks.size());
  if (blocks.size() == 1) {
    out.push_back(stacked.to(blocks[0].options()));
    return out;
  }
  int64_t start = 0;
  for (const Tensor& block : blocks) {
    Tensor part = at::empty(block.sizes(), block.options());
    part.copy_(stacked.narrow(dim, start, block.size(dim)));
    start += block.size(dim);
    out.push_back(std::move(part));
  }
  return out;
}

Mask mask_of(double dropout, const OptTensor& bits) {
  if (dropout <= 0) return {};
  const double keep = std::max(1.0, std::round((1.0 - dropout) * 65536.0)) / 65536.0;
  return {true, keep, bits ? *bits : Tensor()};
}

Outputs evaluate(const AdaptArgs& args, const DeviceKernels& kernels) {
  check_adapt(args);
  const Tensor x = as_matrix(args.x);
  const Columns columns = kernels.stack_columns(args.B, args.scaling, x);
  const Range own{0, columns.B.size(1)};
  Mask mask = mask_of(args.dropout, args.bits);
  Tensor norms;
  const Tensor u = kernels.project(x, mask, kernels.stack_rows(args.A, x), own,
                                   args.want_norms ? &norms : nullptr);
  auto [s, tap] = kernels.take_taps(u, args.taps, own.size, args.keep_tap);
  const Tensor base = args.base_out ? as_matrix(*args.base_out) : Tensor();
  Tensor y = kernels.expand(s, columns.B.t(), columns.alpha,
                            args.base_out ? &base : pointer_to(args.bias), nullptr);
  if (args.weight) y.addmm_(x, args.weight->t());

  const bool is_drawn = mask.is_on && !args.bits;
  if (!norms.defined()) norms = at::empty({0}, x.options().dtype(at::kFloat));
  tap = tap.defined() ? with_leading_dims(tap, args.x) : at::empty({0}, x.options());
  return {with_leading_dims(y, args.x), with_leading_dims(s, args.x), tap,
          is_drawn ? mask.bits : at::empty({0}, x.options().dtype(at::kByte)), norms};
}

namespace {

/// ds and dB, where gy may be missing.
std::pair<Tensor, std::vector<Tensor>> grads_of_expansion(const BackwardArgs& args,
                                                          const Tensor& gy,
                                                          const DeviceKernels& kernels) {
  if (gy.defined()) {
    const Tensor s = as_matrix(args.s);
    auto grads = kernels.expand_grad(gy, kernels.stack_columns(args.B, args.scaling, gy),
                                     args.needs[2] ? &s : nullptr, args.B, args.scaling);
    if (args.gs) grads.first.add_(as_matrix(*args.gs));
    return grads;
  }
  std::vector<Tensor> dB;
  if (args.needs[2])
    for (const Tensor& B : args.B) dB.push_back(at::zeros_like(B));
  return {args.gs ? as_matrix(*args.gs).clone() : at::zeros_like(as_matrix(args.s)), dB};
}

/// du [T, RA]: the gradient of the down-projection, from s and from the tap's readers.
Tensor grad_of_u(const BackwardArgs& args, const Tensor& ds, int64_t tap_rows) {
  if (args.keep_tap) return args.gtap ? at::add(ds, as_matrix(*args.gtap)) : ds;
  if (tap_rows == 0) return ds;
  return at::cat(
      {ds, args.gtap ? as_matrix(*args.gtap) : at::zeros({ds.size(0), tap_rows}, ds.options())}, 1);
}

}  // namespace

Gradients evaluate_backward(const BackwardArgs& args, const DeviceKernels& kernels) {
  const Tensor x = as_matrix(args.x);
  const Tensor gy = args.gy ? as_matrix(*args.gy) : Tensor();
  const Mask mask = mask_of(args.dropout, args.bits);

  auto [ds, dB] = grads_of_expansion(args, gy, kernels);
  Tensor dx = at::empty({0}, x.options());
  std::vector<Tensor> dA;
  if (args.needs[0] || args.needs[1]) {
    const int64_t tap_rows = args.A.size() > args.B.size() ? args.A.back().size(0) : 0;
    const Tensor du = grad_of_u(args, ds, tap_rows);
    if (args.needs[1]) dA = kernels.project_grad(du, x, mask, args.A);
    if (args.needs[0]) {
      dx =
          kernels.expand(du, kernels.stack_rows(args.A, x), 1 / mask.keep, nullptr, mask.pointer());
      if (args.weight && gy.defined()) dx.addmm_(gy, *args.weight);
      dx = with_leading_dims(dx, args.x);
    }
  }
  return {dx, with_leading_dims(ds, args.x), std::move(dA), std::move(dB)};
}

}  // namespace ops

AdaptOutput adapt(const AdaptInput& in) {
  using Schema =
      ops::Outputs(const at::Tensor&, const ops::OptTensor&, const ops::OptTensor&,
                   const ops::OptTensor&, at::TensorList, at::TensorList, at::ArrayRef<double>,
                   at::TensorList, double, const ops::OptTensor&, bool, bool);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reslora::adapt", "").typed<Schema>();
  auto [y, s, tap, bits, norms] =
      op.call(in.x, in.weight, in.bias, in.base_out, in.A, in.B, in.scaling, in.taps, in.dropout,
              in.bits, in.keep_tap, in.want_norms);
  return {std::move(y), std::move(s), std::move(tap), std::move(bits), std::move(norms)};
}

void record_norms(const at::Tensor& norms, const at::Tensor& ring, const at::Tensor& count) {
  using Schema = void(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reslora::record_norms", "").typed<Schema>();
  op.call(norms, ring, count);
}

}  // namespace reslora
