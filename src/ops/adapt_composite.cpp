// `adapt` on every device without kernels of its own (CUDA, MPS, XPU, ...): plain ATen.
//
// With dropout this form makes a T x in copy of x for the length of one GEMM; the CPU kernels do
// not.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "ops/adapt_kernels.h"
#include "ops/norm_ring.h"

namespace reslora::ops {
namespace {

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
  return flags.view({bits.size(0), 8 * bits.size(1)}).narrow(1, 0, x.size(1));
}

Tensor dropped(const Tensor& x, const Tensor& bits) {
  return at::where(unpack(bits, x), x, at::zeros({}, x.options()));
}

/// The B blocks of a layer in x's dtype on x's device, stacked.
struct Columns {
  Tensor B;      // [out, R]
  double alpha;  // what s B^T is still to be multiplied with: the scaling, or 1 where B has it
};

Columns stack_columns(at::TensorList B, at::ArrayRef<double> scaling, const Tensor& like) {
  if (is_uniform(scaling)) return {stack(B, 1, like), scaling[0]};
  std::vector<Tensor> scaled;
  for (size_t k = 0; k < B.size(); ++k) {  // scaled in the wider of both types
    const auto wide = at::promote_types(B[k].scalar_type(), like.scalar_type());
    scaled.push_back(B[k].to(wide).mul(scaling[k]));
  }
  return {stack(scaled, 1, like), 1.0};
}

/// |t|_F as a 0-d tensor, summed in fp32 at least.
Tensor frobenius_norm(const Tensor& t) {
  const auto dtype = t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto norm = [&](const Tensor& part) {
    return at::linalg_vector_norm(part, 2, std::nullopt, false, dtype);
  };
  if (!t.is_cpu() || t.scalar_type() == dtype) return norm(t);
  constexpr int64_t kRows = 64;  // on the CPU ATen copies what it casts: a few rows at a time
  std::vector<Tensor> parts = {at::zeros({}, t.options().dtype(dtype))};
  for (int64_t row = 0; row < t.size(0); row += kRows)
    parts.push_back(norm(t.narrow(0, row, std::min(kRows, t.size(0) - row))));
  return norm(at::stack(parts));
}

Tensor project(const Tensor& x, Mask& mask, at::TensorList blocks, at::ArrayRef<Range> own,
               Tensor* norms) {
  const Tensor A = stack(blocks, 0, x);
  Tensor u;
  if (mask.is_on) {
    if (!mask.bits.defined()) mask.bits = draw_bits(x, mask.keep);
    u = at::empty({x.size(0), A.size(0)}, x.options());
    u.addmm_(dropped(x, mask.bits), A.t(), 0, 1 / mask.keep);
  } else {
    u = at::mm(x, A.t());
  }
  if (norms) *norms = norms_of(x, u, own);
  return u;
}

TapsTaken take_taps(const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own) {
  TapsTaken taken;
  for (size_t g = 0; g < members.size(); ++g) {
    const Range rest = tap_columns(own, g, u.size(1));
    const bool is_all = own[g].size == u.size(1);
    const Tensor part = is_all ? u : u.narrow(1, own[g].first, own[g].size);
    Tensor s = part, tap;
    for (const Tensor& one : members[g].taps) {
      const Tensor addend = as_matrix(one).to(u.options());
      s = s.is_same(part) ? at::add(part, addend) : s.add_(addend);
    }
    if (rest.size > 0) {
      tap = u.narrow(1, rest.first, rest.size);
    } else if (members[g].keep_tap) {
      tap = part;
    }
    // u itself may be one result of a member that is alone.
    if (s.is_alias_of(u) && !s.is_same(u)) s = s.clone(at::MemoryFormat::Contiguous);
    if (tap.defined() && (!tap.is_same(u) || s.is_same(u)))
      tap = tap.clone(at::MemoryFormat::Contiguous);
    taken.emplace_back(std::move(s), std::move(tap));
  }
  return taken;
}

Tensor expand(const Tensor& s, at::TensorList B, at::ArrayRef<double> scaling, const Tensor* base) {
  const Columns columns = stack_columns(B, scaling, s);
  if (base) return at::addmm(*base, s, columns.B.t(), 1, columns.alpha);
  Tensor out = at::empty({s.size(0), columns.B.size(0)}, s.options());
  return out.addmm_(s, columns.B.t(), 0, columns.alpha);
}

Tensor project_back(const Tensor& du, at::TensorList A, const Mask& mask) {
  const Tensor rows = stack(A, 0, du);
  Tensor out = at::empty({du.size(0), rows.size(1)}, du.options());
  out.addmm_(du, rows, 0, 1 / mask.keep);
  if (mask.is_on) out.masked_fill_(unpack(mask.bits, out).logical_not(), 0);
  return out;
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  if (!mask.is_on) return unstack(at::mm(du.t(), x), A, 0);
  return unstack(at::mm(du.t(), dropped(x, mask.bits)).mul_(1 / mask.keep), A, 0);
}

/// ds without gs, and dB where it is wanted.
std::pair<Tensor, std::vector<Tensor>> products_of_gy(const MemberGrads& member, bool needs_dB) {
  const Tensor gy = as_matrix(*member.gy);
  const Columns columns = stack_columns(member.B, member.scaling, gy);
  Tensor ds = at::empty({gy.size(0), columns.B.size(1)}, gy.options());
  ds.addmm_(gy, columns.B, 0, columns.alpha);
  if (!needs_dB) return {ds, {}};
  const Tensor s = as_matrix(*member.s);
  // The wide matrix stands on the right: transposed on the left it would be copied for bf16.
  Tensor dBt = at::empty({s.size(1), gy.size(1)}, gy.options());
  dBt.addmm_(s.t(), gy, 0, columns.alpha);
  std::vector<Tensor> blocks = unstack(dBt.t(), member.B, 1);
  if (!is_uniform(member.scaling))
    for (size_t k = 0; k < blocks.size(); ++k) blocks[k].mul_(member.scaling[k]);
  return {ds, std::move(blocks)};
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const MemberGrads& member, bool needs_dB,
                                                   const Tensor* du) {
  std::pair<Tensor, std::vector<Tensor>> grads;
  auto& [ds, dB] = grads;
  if (member.gy) {
    grads = products_of_gy(member, needs_dB);
    if (member.gs) ds.add_(as_matrix(*member.gs));
  } else {
    ds = as_matrix(member.gs ? *member.gs : *member.s);
    ds = member.gs ? ds.clone(at::MemoryFormat::Contiguous) : at::zeros(ds.sizes(), ds.options());
    if (needs_dB)
      for (const Tensor& B : member.B) dB.push_back(at::zeros_like(B));
  }
  if (du) write_du(member, ds, *du);
  return grads;
}

void record_norms_aten(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
  const std::lock_guard<std::mutex> lock(ring_mutex());
  const Tensor column = count.remainder(ring.size(1));  // a tensor: the host need not know it
  Tensor target = ring;
  target.index_copy_(1, column, norms.reshape({2, 1}));
  Tensor written = count;
  written.add_(1);
}

const DeviceKernels& aten_kernels(const Tensor&) { return kAtenKernels; }

std::string kernels_of_aten(const Tensor&) {
  return "ATen's form (this build has no kernels of its own for the device)";
}

}  // namespace

void write_du(const MemberGrads& member, const Tensor& ds, Tensor du) {
  const Tensor gtap = member.gtap ? as_matrix(*member.gtap) : Tensor();
  const int64_t R = ds.size(1), rest = du.size(1) - R;
  if (rest > 0) {
    at::cat_out(du, {ds, gtap.defined() ? gtap : at::zeros({ds.size(0), rest}, ds.options())}, 1);
  } else if (member.keep_tap && gtap.defined()) {
    at::add_out(du, ds, gtap);
  } else {
    du.copy_(ds);
  }
}

Tensor norms_of(const Tensor& x, const Tensor& u, at::ArrayRef<Range> own) {
  const Tensor norm = frobenius_norm(x);
  std::vector<Tensor> norms;
  for (const Range& range : own) {
    norms.push_back(norm);
    norms.push_back(frobenius_norm(u.narrow(1, range.first, range.size)));
  }
  return at::stack(norms).to(at::kFloat);
}

const DeviceKernels kAtenKernels = {project,     take_taps,    expand,
                                    expand_grad, project_grad, project_back};

TORCH_LIBRARY_IMPL(reslora, CompositeExplicitAutograd, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_with<aten_kernels>);
  m.impl("adapt_backward", adapt_backward_with<aten_kernels>);
  m.impl("record_norms", record_norms_aten);
  m.impl("kernels_of", kernels_of_aten);
}

}  // namespace reslora::ops
