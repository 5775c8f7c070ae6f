// What `adapt` accepts, and the shapes it returns (the Meta kernels; symbolic sizes).
#include <ATen/ATen.h>
#include <torch/library.h>

#include "detail/check.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

using at::Tensor;

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

void check_base(const AdaptArgs& args) {
  const Tensor& x = args.x;
  RESLORA_CHECK(args.weight.has_value() != args.base_out.has_value(),
                "[adapt] pass either weight or base_out; got {}", args.weight ? "both" : "neither");
  const Tensor& out = args.weight ? *args.weight : *args.base_out;
  RESLORA_CHECK(out.scalar_type() == x.scalar_type(),
                "[adapt] x and the base must have one dtype; got x {}, {} {}", type_name(x),
                args.weight ? "weight" : "base_out", type_name(out));
  RESLORA_CHECK(out.device() == x.device(),
                "[adapt] x and the base must be on one device; got x on {}, {} on {}",
                x.device().str(), args.weight ? "weight" : "base_out", out.device().str());
  if (args.weight) {
    RESLORA_CHECK(args.weight->dim() == 2 && args.weight->sym_size(1) == x.sym_size(-1),
                  "[adapt] x and weight must agree on in_features; got x {}, weight {}", shape(x),
                  shape(*args.weight));
  } else {
    RESLORA_CHECK(has_leading_dims_of(*args.base_out, x) && !args.bias,
                  "[adapt] base_out must have x's leading dimensions and no bias beside it; got "
                  "base_out {}, x {}, {}",
                  shape(*args.base_out), shape(x), args.bias ? "a bias" : "no bias");
  }
  if (args.bias) {
    RESLORA_CHECK(args.bias->dim() == 1 && args.bias->sym_size(0) == out.sym_size(0) &&
                      args.bias->scalar_type() == x.scalar_type(),
                  "[adapt] bias must be [out] in x's dtype; got bias {} {}, weight {} {}",
                  shape(*args.bias), type_name(*args.bias), shape(out), type_name(x));
  }
}

void check_blocks(const AdaptArgs& args) {
  const Tensor& x = args.x;
  const Tensor& base = args.weight ? *args.weight : *args.base_out;
  const c10::SymInt out = args.weight ? base.sym_size(0) : base.sym_size(-1);
  RESLORA_CHECK(
      !args.B.empty() && args.scaling.size() == args.B.size() &&
          (args.A.size() == args.B.size() || args.A.size() == args.B.size() + 1),
      "[adapt] needs one scaling for each B and as many A as B, or one more; got {} A, {} "
      "B, {} scaling",
      args.A.size(), args.B.size(), args.scaling.size());
  RESLORA_CHECK(args.A.size() == args.B.size() || !args.keep_tap,
                "[adapt] one tap at most; got keep_tap together with tap rows");
  for (size_t k = 0; k < args.A.size(); ++k) {
    const Tensor& A = args.A[k];
    RESLORA_CHECK(
        A.dim() == 2 && A.sym_size(1) == x.sym_size(-1) && at::isFloatingType(A.scalar_type()),
        "[adapt] x and A must agree on in_features; got x {}, A[{}] {} {}", shape(x), k, shape(A),
        type_name(A));
    RESLORA_CHECK(!A.is_meta() || x.is_meta(),
                  "[adapt] A must have values; got A[{}] on meta: keep the adapters of a chain "
                  "on a real device when offloading",
                  k);
    if (k == args.B.size()) break;
    const Tensor& B = args.B[k];
    RESLORA_CHECK(B.dim() == 2 && B.sym_size(0) == out && B.sym_size(1) == A.sym_size(0) &&
                      at::isFloatingType(B.scalar_type()),
                  "[adapt] B must be [out, r]; got B[{}] {} {} with A[{}] {} and base {}", k,
                  shape(B), type_name(B), k, shape(A), shape(base));
    RESLORA_CHECK(!B.is_meta() || x.is_meta(),
                  "[adapt] B must have values; got B[{}] on meta: keep the adapters of a chain "
                  "on a real device when offloading",
                  k);
  }
  c10::SymInt R = 0;
  for (const Tensor& B : args.B) R = R + B.sym_size(1);
  for (const Tensor& tap : args.taps)
    RESLORA_CHECK(has_leading_dims_of(tap, x) && tap.sym_size(-1) == R &&
                      at::isFloatingType(tap.scalar_type()),
                  "[adapt] a tap must have x's leading dimensions and {} columns; got tap {}, x {}",
                  R.is_symbolic() ? "R" : std::to_string(R.expect_int()), shape(tap), shape(x));
}

void check_dropout(const AdaptArgs& args) {
  RESLORA_CHECK(args.dropout >= 0 && args.dropout < 1, "[adapt] dropout must be in [0, 1); got {}",
                args.dropout);
  if (args.bits) {
    const c10::SymInt T = args.x.sym_numel() / args.x.sym_size(-1);
    RESLORA_CHECK(
        args.dropout > 0 && args.bits->scalar_type() == at::kByte && args.bits->dim() == 2 &&
            args.bits->sym_size(0) == T &&
            args.bits->sym_size(1) == (args.x.sym_size(-1) + 7) / 8 && args.bits->is_contiguous() &&
            args.bits->device() == args.x.device(),
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

Outputs adapt_meta(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                   const OptTensor& base_out, at::TensorList A, at::TensorList B,
                   at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                   const OptTensor& bits, bool keep_tap, bool want_norms) {
  check_adapt(
      {x, weight, bias, base_out, A, B, scaling, taps, dropout, bits, keep_tap, want_norms});
  c10::SymInt R = 0;
  for (const Tensor& block : B) R = R + block.sym_size(1);
  const c10::SymInt out = weight ? weight->sym_size(0) : base_out->sym_size(-1);
  const Tensor nothing = at::empty({0}, x.options());
  const bool has_rows = A.size() > B.size();
  const Tensor tap = has_rows   ? like_with_columns(x, A.back().sym_size(0))
                     : keep_tap ? like_with_columns(x, R)
                                : nothing;
  const bool draws = dropout > 0 && !bits;
  const c10::SymInt T = x.sym_numel() / x.sym_size(-1);
  const Tensor drawn =
      draws ? at::empty_symint({T, (x.sym_size(-1) + 7) / 8}, x.options().dtype(at::kByte))
            : at::empty({0}, x.options().dtype(at::kByte));
  const Tensor norms = at::empty({want_norms ? 2 : 0}, x.options().dtype(at::kFloat));
  return {like_with_columns(x, out), like_with_columns(x, R), tap, drawn, norms};
}

std::vector<Tensor> grads_like(at::TensorList blocks, bool is_needed) {
  std::vector<Tensor> grads;
  if (is_needed)
    for (const Tensor& block : blocks)
      grads.push_back(at::empty_symint(block.sym_sizes(), block.options()));
  return grads;
}

Gradients adapt_backward_meta(const OptTensor&, const OptTensor&, const OptTensor&, const Tensor& x,
                              const OptTensor&, at::TensorList A, at::TensorList B,
                              at::ArrayRef<double>, const Tensor& s, const OptTensor&, double, bool,
                              std::array<bool, 3> needs) {
  Tensor dx = needs[0] ? at::empty_symint(x.sym_sizes(), x.options()) : at::empty({0}, x.options());
  return {dx, at::empty_symint(s.sym_sizes(), s.options()), grads_like(A, needs[1]),
          grads_like(B, needs[2])};
}

void record_norms_meta(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
}

}  // namespace

void check_record_norms(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  RESLORA_CHECK(
      norms.sym_numel() == 2 && norms.scalar_type() == at::kFloat && ring.dim() == 2 &&
          ring.sym_size(0) == 2 && ring.sym_size(1) >= 1 && ring.scalar_type() == at::kFloat &&
          ring.is_contiguous() && count.sym_numel() == 1 && count.scalar_type() == at::kLong &&
          ring.device() == norms.device() && count.device() == norms.device(),
      "[record_norms] norms must be float32 [2], ring contiguous float32 [2, N] and count "
      "int64 [1], on one device; got {} {}, {} {} and {} {}",
      shape(norms), type_name(norms), shape(ring), type_name(ring), shape(count), type_name(count));
}

void check_adapt(const AdaptArgs& args) {
  RESLORA_CHECK(
      args.x.dim() >= 1 && at::isFloatingType(args.x.scalar_type()) && args.x.sym_size(-1) >= 1,
      "[adapt] x must be floating point with at least one feature; got x {} {}", shape(args.x),
      type_name(args.x));
  check_base(args);
  check_blocks(args);
  check_dropout(args);
}

TORCH_LIBRARY_IMPL(reslora, Meta, m) {
  m.impl("adapt", adapt_meta);
  m.impl("adapt_backward", adapt_backward_meta);
  m.impl("record_norms", record_norms_meta);
}

}  // namespace reslora::ops
