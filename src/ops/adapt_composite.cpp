// `adapt` on every device without kernels of its own (CUDA, MPS, XPU, ...): plain ATen.
//
// With dropout this form makes a T x in copy of x for the length of one GEMM; the CPU kernels do
// not.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

using at::Tensor;

Tensor powers_of_two(const Tensor& like) {
  return at::bitwise_left_shift(at::ones({8}, like.options().dtype(at::kByte)),
                                at::arange(8, like.options().dtype(at::kByte)));
}

Tensor draw_bits(const Tensor& x, double keep) {
  const int64_t row_bytes = (x.size(1) + 7) / 8;
  Tensor coins = at::empty({x.size(0), row_bytes, 8}, x.options().dtype(at::kFloat));
  coins.bernoulli_(keep);
  return coins.to(at::kByte).mul_(powers_of_two(x)).sum(-1, false, at::kByte);
}

/// bits [T, ceil(in/8)] as a mask [T, in] in x's dtype.
Tensor unpack(const Tensor& bits, const Tensor& x) {
  const Tensor flags = bits.unsqueeze(-1).bitwise_and(powers_of_two(x)).ne(0);
  return flags.view({bits.size(0), -1}).narrow(1, 0, x.size(1));
}

Tensor dropped(const Tensor& x, const Tensor& bits) {
  return at::where(unpack(bits, x), x, at::zeros({}, x.options()));
}

void project(const Tensor& x, const Tensor& bits, const Tensor& A, double keep, Tensor& out) {
  out.addmm_(dropped(x, bits), A.t(), 0, 1 / keep);
}

Tensor project_grad(const Tensor& du, const Tensor& x, const Tensor& bits, double keep) {
  return at::mm(du.t(), dropped(x, bits)).mul_(1 / keep);
}

void expand(const Tensor& du, const Tensor& A, const Tensor& bits, double keep, Tensor& dx) {
  dx.addmm_(du, A, 0, 1 / keep);
  dx.masked_fill_(unpack(bits, dx).logical_not(), 0);
}

void record_norms_aten(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
  const Tensor column = count.remainder(ring.size(1));  // a tensor: the host need not know it
  Tensor target = ring;
  target.index_copy_(1, column, norms.unsqueeze(1));
  Tensor written = count;
  written.add_(1);
}

Outputs adapt_aten(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                   const OptTensor& base_out, at::TensorList A, at::TensorList B,
                   at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                   const OptTensor& bits, bool keep_tap, bool want_norms) {
  return evaluate(
      {x, weight, bias, base_out, A, B, scaling, taps, dropout, bits, keep_tap, want_norms},
      kAtenKernels);
}

Gradients adapt_backward_aten(const OptTensor& gy, const OptTensor& gs, const OptTensor& gtap,
                              const Tensor& x, const OptTensor& weight, at::TensorList A,
                              at::TensorList B, at::ArrayRef<double> scaling, const Tensor& s,
                              const OptTensor& bits, double dropout, bool keep_tap,
                              std::array<bool, 3> needs) {
  return evaluate_backward(
      {gy, gs, gtap, x, weight, A, B, scaling, s, bits, dropout, keep_tap, needs}, kAtenKernels);
}

}  // namespace

const DeviceKernels kAtenKernels = {draw_bits, project, project_grad, expand};

TORCH_LIBRARY_IMPL(reslora, CompositeExplicitAutograd, m) {
  m.impl("adapt", adapt_aten);
  m.impl("adapt_backward", adapt_backward_aten);
  m.impl("record_norms", record_norms_aten);
}

}  // namespace reslora::ops
