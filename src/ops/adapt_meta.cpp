// What `adapt` accepts, and the shapes it returns (the Meta kernels; symbolic sizes).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

std::string shape(const Tensor& t) {
  std::string text = "[";
  for (const auto& size : t.sym_sizes()) {
    if (text.size() > 1) text += ", ";
    text += size.is_symbolic() ? "?" : std::to_string(size.expect_int());
  }
  return text + "]";
}

bool has_leading_dims_of(const Tensor& t, const Tensor& x) {
  return t.dim() == x.dim() &&
         t.sym_sizes().slice(0, t.dim() - 1) == x.sym_sizes().slice(0, x.dim() - 1);
}

const char* type_name(const Tensor& t) { return c10::toString(t.scalar_type()); }

bool is_dense(const Tensor& t) { return t.layout() == at::kStrided; }

void check_base(const Tensor& x, const Member& member) {
  const Tensor& out = member.base();
  const char* what = member.weight ? "weight" : "base_out";
  RESLORA_CHECK(out.scalar_type() == x.scalar_type(),
                "[adapt] x and the base must have one dtype; got x {}, {} {}", type_name(x), what,
                type_name(out));
  RESLORA_CHECK(out.device() == x.device(),
                "[adapt] x and the base must be on one device; got x on {}, {} on {}",
                x.device().str(), what, out.device().str());
  RESLORA_CHECK(is_dense(out), "[adapt] {} must be a dense tensor; got one of another layout",
                what);
  if (member.weight) {
    RESLORA_CHECK(out.dim() == 2 && out.sym_size(1) == x.sym_size(-1),
                  "[adapt] x and weight must agree on in_features; got x {}, weight {}", shape(x),
                  shape(out));
  } else {
    RESLORA_CHECK(has_leading_dims_of(out, x),
                  "[adapt] base_out must have x's leading dimensions; got base_out {}, x {}",
                  shape(out), shape(x));
  }
  if (!member.bias) return;
  RESLORA_CHECK(
      member.bias->dim() == 1 && member.bias->sym_size(0) == out.sym_size(0) &&
          member.bias->scalar_type() == x.scalar_type() && member.bias->device() == x.device() &&
          is_dense(*member.bias),
      "[adapt] bias must be dense [out] in x's dtype on its device; got bias {} {} on {}, "
      "weight {} {} on {}",
      shape(*member.bias), type_name(*member.bias), member.bias->device().str(), shape(out),
      type_name(x), x.device().str());
}

void check_has_values(const Tensor& block, const char* name, size_t k, const Tensor& x) {
  RESLORA_CHECK(!block.is_meta() || x.is_meta(),
                "[adapt] {} must have values; got {}[{}] on meta: keep the adapters of a chain on "
                "a real device when offloading",
                name, name, k);
  RESLORA_CHECK(is_dense(block), "[adapt] {} must be dense tensors; got {}[{}] of another layout",
                name, name, k);
}

void check_blocks(const Tensor& x, const Member& member) {
  const Tensor& base = member.base();
  const c10::SymInt out = member.weight ? base.sym_size(0) : base.sym_size(-1);
  RESLORA_CHECK(!member.B.empty() &&
                    (member.A.size() == member.B.size() || member.has_tap_rows()) &&
                    member.A.size() <= member.B.size() + 1,
                "[adapt] needs as many A as B, or one more; got {} A, {} B", member.A.size(),
                member.B.size());
  RESLORA_CHECK(!member.has_tap_rows() || !member.keep_tap,
                "[adapt] one tap at most; got keep_tap together with tap rows");
  for (size_t k = 0; k < member.A.size(); ++k) {
    const Tensor& A = member.A[k];
    RESLORA_CHECK(
        A.dim() == 2 && A.sym_size(1) == x.sym_size(-1) && at::isFloatingType(A.scalar_type()),
        "[adapt] x and A must agree on in_features; got x {}, A[{}] {} {}", shape(x), k, shape(A),
        type_name(A));
    check_has_values(A, "A", k, x);
    if (k == member.B.size()) break;
    const Tensor& B = member.B[k];
    RESLORA_CHECK(B.dim() == 2 && B.sym_size(0) == out && B.sym_size(1) == A.sym_size(0) &&
                      at::isFloatingType(B.scalar_type()),
                  "[adapt] B must be [out, r]; got B[{}] {} {} with A[{}] {} and base {}", k,
                  shape(B), type_name(B), k, shape(A), shape(base));
    check_has_values(B, "B", k, x);
  }
  c10::SymInt R = 0;
  for (const Tensor& B : member.B) R = R + B.sym_size(1);
  for (size_t k = 0; k < member.taps.size(); ++k) {
    const Tensor& tap = member.taps[k];
    RESLORA_CHECK(has_leading_dims_of(tap, x) && tap.sym_size(-1) == R &&
                      at::isFloatingType(tap.scalar_type()),
                  "[adapt] a tap must have x's leading dimensions and {} columns; got tap {}, x {}",
                  R.is_symbolic() ? "R" : std::to_string(R.expect_int()), shape(tap), shape(x));
    check_has_values(tap, "taps", k, x);
  }
}

void check_dropout(const AdaptArgs& args) {
  RESLORA_CHECK(args.dropout >= 0 && args.dropout < 1, "[adapt] dropout must be in [0, 1); got {}",
                args.dropout);
  if (args.bits) {
    const c10::SymInt T = args.x.sym_numel() / args.x.sym_size(-1);
    RESLORA_CHECK(
        args.dropout > 0 && args.bits->scalar_type() == at::kByte && args.bits->dim() == 2 &&
            args.bits->sym_size(0) == T &&
            args.bits->sym_size(1) == (args.x.sym_size(-1) + 7) / 8 && is_dense(*args.bits) &&
            args.bits->is_contiguous() && args.bits->device() == args.x.device(),
        "[adapt] bits must be contiguous uint8 [T, ceil(in/8)] on x's device, with dropout "
        "> 0; got bits {} {}, dropout {}, x {}",
        shape(*args.bits), type_name(*args.bits), args.dropout, shape(args.x));
  }
}

Tensor like_with_columns(const Tensor& x, const c10::SymInt& columns) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = columns;
  return at::empty_symint(sizes, x.options());
}

std::vector<Tensor> adapt_meta(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                               at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                               at::TensorList taps, double dropout, const OptTensor& bits,
                               bool want_norms) {
  const AdaptArgs args =
      sorted_args(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
  check_adapt(args);
  std::vector<Tensor> out;
  for (const Member& member : args.members) {
    c10::SymInt R = 0;
    for (const Tensor& block : member.B) R = R + block.sym_size(1);
    out.push_back(like_with_columns(x, member.base().sym_size(member.weight ? 0 : -1)));
    out.push_back(like_with_columns(x, R));
    out.push_back(member.has_tap_rows() ? like_with_columns(x, member.A.back().sym_size(0))
                  : member.keep_tap     ? like_with_columns(x, R)
                                        : at::empty({0}, x.options()));
  }
  const c10::SymInt T = x.sym_numel() / x.sym_size(-1);
  out.push_back(dropout > 0 && !bits
                    ? at::empty_symint({T, (x.sym_size(-1) + 7) / 8}, x.options().dtype(at::kByte))
                    : at::empty({0}, x.options().dtype(at::kByte)));
  const auto members = static_cast<int64_t>(args.members.size());
  out.push_back(at::empty({want_norms ? 2 * members : 0}, x.options().dtype(at::kFloat)));
  return out;
}

std::vector<Tensor> grads_like(at::TensorList blocks, bool is_needed) {
  std::vector<Tensor> grads;
  if (is_needed)
    for (const Tensor& block : blocks)
      grads.push_back(at::empty_symint(block.sym_sizes(), block.options()));
  return grads;
}

Gradients adapt_backward_meta(at::TensorList, at::IntArrayRef, const Tensor& x, at::TensorList s,
                              at::TensorList A, at::TensorList B, at::ArrayRef<double>,
                              const OptTensor&, double, std::array<bool, 3> needs) {
  Tensor dx = needs[0] ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  return {dx, grads_like(s, true), grads_like(A, needs[1]), grads_like(B, needs[2])};
}

void record_norms_meta(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
}

}  // namespace

void check_record_norms(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  RESLORA_CHECK(
      is_dense(norms) && is_dense(ring) && is_dense(count) && norms.sym_numel() == 2 &&
          norms.scalar_type() == at::kFloat && ring.dim() == 2 && ring.sym_size(0) == 2 &&
          ring.sym_size(1) >= 1 && ring.scalar_type() == at::kFloat && ring.is_contiguous() &&
          count.sym_numel() == 1 && count.scalar_type() == at::kLong &&
          ring.device() == norms.device() && count.device() == norms.device(),
      "[record_norms] norms must be float32 [2], ring contiguous float32 [2, N] and count "
      "int64 [1], on one device; got {} {}, {} {} and {} {}",
      shape(norms), type_name(norms), shape(ring), type_name(ring), shape(count), type_name(count));
}

void check_adapt(const AdaptArgs& args) {
  RESLORA_CHECK(
      is_dense(args.x) && args.x.dim() >= 1 && at::isFloatingType(args.x.scalar_type()) &&
          args.x.sym_size(-1) >= 1,
      "[adapt] x must be dense and floating point with at least one feature; got x {} {}{}",
      shape(args.x), type_name(args.x), is_dense(args.x) ? "" : " of another layout");
  for (const Member& member : args.members) {
    check_base(args.x, member);
    check_blocks(args.x, member);
  }
  check_dropout(args);
}

TORCH_LIBRARY_IMPL(reslora, Meta, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_meta);
  m.impl("adapt_backward", adapt_backward_meta);
  m.impl("record_norms", record_norms_meta);
}

}  // namespace reslora::ops
