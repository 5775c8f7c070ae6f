// The op `adapt` with ATen GEMMs, on any device, and its public C++ entry.
//
// Order that saves a pass each way (the low-rank term is written first, the big GEMM accumulates):
//   forward   u = x A^T;  s = u[:, :R] + taps;  y = bias + s B^T;  y += x W^T
//   backward  ds = gy B + gs;  dB = gy^T s;  du = [ds | gtap];  dx = du A;  dx += gy W;  dA = du^T
//   x
// The scaling rides on the small GEMMs as alpha, or is folded into B where blocks differ in it.
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

/// Blocks stacked in x's dtype on x's device.
struct Stacked {
  Tensor A;      // [RA, in]
  Tensor B;      // [out, R]
  double alpha;  // what s B^T is still to be multiplied with
  int64_t R;     // rows of the A blocks that enter B
};

Tensor as_matrix(const Tensor& x) {
  Tensor m = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  // BLAS takes rows or columns that are dense; anything else is made dense once.
  return m.stride(1) == 1 || m.stride(0) == 1 ? m : m.contiguous();
}

Tensor with_leading_dims(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = matrix.size(1);
  return matrix.view(sizes);
}

Tensor stack(at::TensorList blocks, int64_t dim, const Tensor& like) {
  if (blocks.size() == 1) return blocks[0].to(like.options());
  std::vector<Tensor> cast;
  cast.reserve(blocks.size());
  for (const Tensor& block : blocks) cast.push_back(block.to(like.options()));
  return at::cat(cast, dim);
}

Tensor stack_scaled(at::TensorList blocks, at::ArrayRef<double> scaling, const Tensor& like) {
  std::vector<Tensor> scaled;
  scaled.reserve(blocks.size());
  for (size_t k = 0; k < blocks.size(); ++k)
    scaled.push_back(blocks[k].mul(scaling[k]).to(like.options()));
  return at::cat(scaled, 1);
}

bool is_uniform(at::ArrayRef<double> scaling) {
  return std::all_of(scaling.begin(), scaling.end(), [&](double s) { return s == scaling[0]; });
}

Stacked stack_blocks(at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                     const Tensor& like) {
  Stacked stacked;
  stacked.A = stack(A, 0, like);
  const bool uniform = is_uniform(scaling);
  stacked.B = uniform ? stack(B, 1, like) : stack_scaled(B, scaling, like);
  stacked.alpha = uniform ? scaling[0] : 1.0;
  stacked.R = stacked.B.size(1);
  return stacked;
}

/// Cuts a stacked gradient into one tensor per block, in the block's own dtype and device. The
/// blocks are copies: outputs of an op must not share memory.
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

/// |t|_F as a 0-d tensor, summed in fp32 at least.
Tensor frobenius_norm(const Tensor& t) {
  return at::linalg_vector_norm(t, 2, std::nullopt, false,
                                t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

/// Adds the base layer onto the low-rank term: bias and s B^T first, then the big GEMM.
Tensor finish_y(const AdaptArgs& args, const Tensor& x, const Tensor& s, const Stacked& blocks) {
  const Tensor Bt = blocks.B.t();
  if (args.base_out) return at::addmm(as_matrix(*args.base_out), s, Bt, 1, blocks.alpha);
  Tensor y;
  if (args.bias) {
    y = at::addmm(*args.bias, s, Bt, 1, blocks.alpha);
  } else {
    y = at::empty({x.size(0), blocks.B.size(0)}, x.options());
    y.addmm_(s, Bt, 0, blocks.alpha);
  }
  return y.addmm_(x, args.weight->t());
}

}  // namespace

double keep_probability(double dropout) {
  return std::max(1.0, std::round((1.0 - dropout) * 65536.0)) / 65536.0;
}

Outputs evaluate(const AdaptArgs& args, const DeviceKernels& kernels) {
  check_adapt(args);
  const Tensor x = as_matrix(args.x);
  const Stacked blocks = stack_blocks(args.A, args.B, args.scaling, x);
  const bool has_tap_rows = args.A.size() > args.B.size();

  Tensor drawn = at::empty({0}, x.options().dtype(at::kByte));
  Tensor u;
  if (args.dropout > 0) {
    const double keep = keep_probability(args.dropout);
    if (!args.bits) drawn = kernels.draw_bits(x, keep);
    u = at::empty({x.size(0), blocks.A.size(0)}, x.options());
    kernels.project(x, args.bits ? *args.bits : drawn, blocks.A, keep, u);
  } else {
    u = at::mm(x, blocks.A.t());
  }

  const Tensor own = has_tap_rows ? u.narrow(1, 0, blocks.R) : u;
  const Tensor norms = args.want_norms
                           ? at::stack({frobenius_norm(x), frobenius_norm(own)}).to(at::kFloat)
                           : at::empty({0}, x.options().dtype(at::kFloat));
  Tensor s = own;
  for (const Tensor& tap : args.taps) {
    const Tensor addend = as_matrix(tap).to(x.options());
    s = s.is_same(own) ? at::add(own, addend) : s.add_(addend);
  }
  Tensor tap = at::empty({0}, x.options());
  if (has_tap_rows) {
    tap = u.narrow(1, blocks.R, u.size(1) - blocks.R).clone(at::MemoryFormat::Contiguous);
    if (args.taps.empty()) s = s.clone(at::MemoryFormat::Contiguous);
  } else if (args.keep_tap) {
    tap = args.taps.empty() ? u.clone() : u;
  }
  const bool has_tap = returns_tap(args.A.size(), args.B.size(), args.keep_tap);
  return {with_leading_dims(finish_y(args, x, s, blocks), args.x), with_leading_dims(s, args.x),
          has_tap ? with_leading_dims(tap, args.x) : tap, drawn, norms};
}

namespace {

/// ds = gs + alpha gy B, where either may be missing.
Tensor grad_of_s(const BackwardArgs& args, const Tensor& gy, const Stacked& blocks) {
  const int64_t T = args.x.numel() / std::max<int64_t>(args.x.size(-1), 1);
  if (!gy.defined()) {
    return args.gs ? as_matrix(*args.gs).clone() : at::zeros({T, blocks.R}, args.x.options());
  }
  if (args.gs) return at::addmm(as_matrix(*args.gs), gy, blocks.B, 1, blocks.alpha);
  return at::empty({T, blocks.R}, args.x.options()).addmm_(gy, blocks.B, 0, blocks.alpha);
}

/// du [T, RA]: the gradient of the down-projection, from s and from the tap's readers.
Tensor grad_of_u(const BackwardArgs& args, const Tensor& ds, const Stacked& blocks) {
  if (args.keep_tap) return args.gtap ? at::add(ds, as_matrix(*args.gtap)) : ds;
  const int64_t tap_rows = blocks.A.size(0) - blocks.R;
  if (tap_rows == 0) return ds;
  return at::cat(
      {ds, args.gtap ? as_matrix(*args.gtap) : at::zeros({ds.size(0), tap_rows}, ds.options())}, 1);
}

std::vector<Tensor> grads_of_B(const BackwardArgs& args, const Tensor& gy, const Stacked& blocks) {
  std::vector<Tensor> dB;
  if (!args.needs[2]) return dB;
  if (!gy.defined()) {
    for (const Tensor& B : args.B) dB.push_back(at::zeros_like(B));
    return dB;
  }
  Tensor stacked = at::empty(blocks.B.sizes(), args.x.options());
  stacked.addmm_(gy.t(), as_matrix(args.s), 0, blocks.alpha);
  dB = unstack(stacked, args.B, 1);
  if (!is_uniform(args.scaling))
    for (size_t k = 0; k < dB.size(); ++k) dB[k].mul_(args.scaling[k]);
  return dB;
}

}  // namespace

Gradients evaluate_backward(const BackwardArgs& args, const DeviceKernels& kernels) {
  const Tensor x = as_matrix(args.x);
  const Stacked blocks = stack_blocks(args.A, args.B, args.scaling, x);
  const Tensor gy = args.gy ? as_matrix(*args.gy) : Tensor();
  const bool is_dropped = args.dropout > 0;
  const double keep = keep_probability(args.dropout);

  const Tensor ds = grad_of_s(args, gy, blocks);
  std::vector<Tensor> dB = grads_of_B(args, gy, blocks);
  Tensor dx = at::empty({0}, x.options());
  std::vector<Tensor> dA;
  if (args.needs[0] || args.needs[1]) {
    const Tensor du = grad_of_u(args, ds, blocks);
    if (args.needs[1]) {
      const Tensor stacked =
          is_dropped ? kernels.project_grad(du, x, *args.bits, keep) : at::mm(du.t(), x);
      dA = unstack(stacked, args.A, 0);
    }
    if (args.needs[0]) {
      if (is_dropped) {
        dx = at::empty({x.size(0), x.size(1)}, x.options());
        kernels.expand(du, blocks.A, *args.bits, keep, dx);
      } else {
        dx = at::mm(du, blocks.A);
      }
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
