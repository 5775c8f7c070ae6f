// What `adapt` computes on any device, forward and backward, out of the kernels of that device.
//
// Order that saves a pass each way (the low-rank term is written first, the big GEMM accumulates):
//   forward   u = x A^T;  s = u[:, :R] + taps;  y = bias + s B^T;  y += x W^T
//   backward  ds = gy B + gs;  dB = gy^T s;  du = [ds | gtap];  dA = du^T x
//             dx = du A;  dx += gy W
// Members that read one x share the down-projection, its mask and the sum in dx.
// The big GEMMs are ATen's; the thin products beside them are the device's (adapt_kernels.h).
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

Tensor with_leading_dims(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = matrix.size(1);
  return at::_unsafe_view(matrix, sizes);  // no view for autograd: users may change y in place
}

/// The mask for a dropout; what is kept is drawn with 1 - dropout to the nearest 1/65536, at least
/// one of them.
Mask mask_of(double dropout, const OptTensor& bits) {
  if (dropout <= 0) return {};
  const double keep = std::max(1.0, std::round((1.0 - dropout) * 65536.0)) / 65536.0;
  return {true, keep, bits ? *bits : Tensor()};
}

}  // namespace

Tensor as_matrix(const Tensor& x) {
  Tensor m = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  // BLAS takes rows or columns that are dense; anything else is made dense once.
  return m.stride(1) == 1 || m.stride(0) == 1 ? m : m.contiguous();
}

Tensor with_dense_rows(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

int64_t total_size(at::TensorList blocks, int64_t dim) {
  int64_t total = 0;
  for (const Tensor& block : blocks) total += block.size(dim);
  return total;
}

Tensor stack(at::TensorList blocks, int64_t dim, const Tensor& like) {
  if (blocks.size() == 1) return blocks[0].to(like.options());
  std::vector<Tensor> cast;
  cast.reserve(blocks.size());
  for (const Tensor& block : blocks) cast.push_back(block.to(like.options()));
  return at::cat(cast, dim);
}

bool is_uniform(at::ArrayRef<double> scaling) {
  return std::all_of(scaling.begin(), scaling.end(), [&](double s) { return s == scaling[0]; });
}

std::vector<Tensor> unstack(const Tensor& stacked, at::TensorList blocks, int64_t dim) {
  std::vector<Tensor> out;
  out.reserve(blocks.size());
  if (blocks.size() == 1) {
    out.push_back(stacked.to(blocks[0].options()).contiguous());
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

std::vector<Tensor> evaluate(const AdaptArgs& args, const DeviceKernels& kernels) {
  check_adapt(args);
  const Tensor x = as_matrix(args.x);
  const size_t count = args.members.size();
  c10::SmallVector<Range, 3> own;
  int64_t first = 0;
  for (const Member& member : args.members) {
    own.push_back({first, total_size(member.B, 1)});
    first += total_size(member.A, 0);
  }
  Mask mask = mask_of(args.dropout, args.bits);
  Tensor norms;
  const Tensor u = kernels.project(x, mask, args.A, own, args.want_norms ? &norms : nullptr);
  std::vector<Tensor> out;
  out.reserve(3 * count + 2);
  const TapsTaken taken = kernels.take_taps(u, args.members, own);
  for (size_t g = 0; g < count; ++g) {
    const Member& member = args.members[g];
    const auto& [s, tap] = taken[g];
    const Tensor base = member.base_out ? as_matrix(*member.base_out) : Tensor();
    Tensor y = kernels.expand(s, member.B, member.scaling, member.base_out ? &base : member.bias);
    if (member.weight) y.addmm_(x, member.weight->t());
    out.push_back(with_leading_dims(y, args.x));
    out.push_back(with_leading_dims(s, args.x));
    out.push_back(tap.defined() ? with_leading_dims(tap, args.x) : at::empty({0}, x.options()));
  }
  out.push_back(mask.is_on && !args.bits ? mask.bits
                                         : at::empty({0}, x.options().dtype(at::kByte)));
  out.push_back(norms.defined() ? norms : at::empty({0}, x.options().dtype(at::kFloat)));
  return out;
}

namespace {

/// True where the gradient of a member's columns of u is more than ds.
bool has_grad_of_tap(const MemberGrads& member) {
  return member.A.size() > member.B.size() || (member.keep_tap && member.gtap);
}

}  // namespace

Gradients evaluate_backward(const BackwardArgs& args, const DeviceKernels& kernels) {
  const Tensor x = as_matrix(args.x);
  const auto [needs_dx, needs_dA, needs_dB] = args.needs;
  const bool needs_du = needs_dx || needs_dA;
  const size_t count = args.members.size();
  std::vector<Tensor> ds, dA, dB;
  Tensor du;  // of all members; that of a single one may be its ds
  if (needs_du && (count > 1 || has_grad_of_tap(args.members[0])))
    du = at::empty({x.size(0), total_size(args.A, 0)}, x.options());
  int64_t first = 0;
  for (const MemberGrads& member : args.members) {
    const int64_t rows = total_size(member.A, 0);
    const Tensor part = du.defined() && count > 1 ? du.narrow(1, first, rows) : du;
    auto [own, blocks] = kernels.expand_grad(member, needs_dB, du.defined() ? &part : nullptr);
    first += rows;
    if (needs_du && !du.defined()) du = own;
    ds.push_back(with_leading_dims(own, args.x));
    dB.insert(dB.end(), std::make_move_iterator(blocks.begin()),
              std::make_move_iterator(blocks.end()));
  }
  if (!needs_du) return {at::empty({0}, x.options()), std::move(ds), std::move(dA), std::move(dB)};

  const Mask mask = mask_of(args.dropout, args.bits);
  if (needs_dA) dA = kernels.project_grad(du, x, mask, args.A);
  Tensor dx = at::empty({0}, x.options());
  if (needs_dx) {
    dx = kernels.project_back(du, args.A, mask);
    for (const MemberGrads& member : args.members)
      if (member.weight && member.gy) dx.addmm_(as_matrix(*member.gy), *member.weight);
    dx = with_leading_dims(dx, args.x);
  }
  return {dx, std::move(ds), std::move(dA), std::move(dB)};
}

}  // namespace reslora::ops
