// What surrounds the kernels of `adapt`: gradients, version counters, autocast, and clear refusals.
//
// The Autograd kernel calls the op again below autograd through the dispatcher, and its backward is
// the op `adapt_backward`: so torch.compile traces both as leaves.
#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "detail/check.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using AdaptSchema = Outputs(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                            at::TensorList, at::TensorList, at::ArrayRef<double>, at::TensorList,
                            double, const OptTensor&, bool, bool);
using BackwardSchema = Gradients(const OptTensor&, const OptTensor&, const OptTensor&,
                                 const Tensor&, const OptTensor&, at::TensorList, at::TensorList,
                                 at::ArrayRef<double>, const Tensor&, const OptTensor&, double,
                                 bool, std::array<bool, 3>);

Outputs call_adapt(const AdaptArgs& a) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reslora::adapt", "").typed<AdaptSchema>();
  return op.call(a.x, a.weight, a.bias, a.base_out, a.A, a.B, a.scaling, a.taps, a.dropout, a.bits,
                 a.keep_tap, a.want_norms);
}

Gradients call_backward(const BackwardArgs& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reslora::adapt_backward", "")
                             .typed<BackwardSchema>();
  return op.call(a.gy, a.gs, a.gtap, a.x, a.weight, a.A, a.B, a.scaling, a.s, a.bits, a.dropout,
                 a.keep_tap, a.needs);
}

constexpr const char* kNoTransforms =
    "[adapt] torch.func transforms (grad, vmap, jvp, ...) are not supported; use autograd "
    "(loss.backward() or torch.autograd.grad), or a Python loop in place of vmap";

void refuse_transforms() {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch) return;
  bool is_active = false;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    is_active = true;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(!is_active, kNoTransforms);
}

bool any_requires_grad(at::TensorList tensors) {
  for (const Tensor& t : tensors)
    if (t.requires_grad()) return true;
  return false;
}

bool requires_grad(const OptTensor& t) { return t && t->defined() && t->requires_grad(); }

OptTensor optional_of(const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }

/// Order of the saved tensors: x, weight, s, bits, then A..., then B....
struct Saved {
  explicit Saved(AutogradContext* ctx) : tensors(ctx->get_saved_variables()) {
    const size_t a_blocks = ctx->saved_data["a_blocks"].toInt();
    const at::TensorList blocks = at::TensorList(tensors).slice(4);
    A = blocks.slice(0, a_blocks);
    B = blocks.slice(a_blocks);
  }
  variable_list tensors;
  at::TensorList A, B;
};

class Adapt : public Function<Adapt> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& weight,
                               const OptTensor& bias, const OptTensor& base_out, at::TensorList A,
                               at::TensorList B, at::ArrayRef<double> scaling, at::TensorList taps,
                               double dropout, const OptTensor& bits, bool keep_tap,
                               bool want_norms) {
    at::AutoDispatchBelowAutograd guard;
    auto [y, s, tap, drawn, norms] = call_adapt(
        {x, weight, bias, base_out, A, B, scaling, taps, dropout, bits, keep_tap, want_norms});
    ctx->set_materialize_grads(false);
    if (returns_tap(A.size(), B.size(), keep_tap)) {
      ctx->mark_non_differentiable({drawn, norms});
    } else {
      ctx->mark_non_differentiable({drawn, norms, tap});
    }
    const bool needs_dx = x.requires_grad();
    const bool needs_dA = any_requires_grad(A);
    // x is read for dA (and, as a shape, for dx); W only for dx; the bits wherever x or dx is
    // masked.
    variable_list saved = {x, needs_dx && weight ? *weight : Tensor(), s,
                           dropout > 0 ? (bits ? *bits : drawn) : Tensor()};
    saved.insert(saved.end(), A.begin(), A.end());
    saved.insert(saved.end(), B.begin(), B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["a_blocks"] = static_cast<int64_t>(A.size());
    ctx->saved_data["scaling"] = scaling.vec();
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["keep_tap"] = keep_tap;
    ctx->saved_data["taps"] = static_cast<int64_t>(taps.size());
    ctx->saved_data["needs_dx"] = needs_dx;
    ctx->saved_data["needs_dA"] = needs_dA;
    ctx->saved_data["needs_dB"] = any_requires_grad(B);
    ctx->saved_data["needs_base"] = requires_grad(base_out);
    return {y, s, tap, drawn, norms};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Saved saved(ctx);
    auto& data = ctx->saved_data;
    const std::array<bool, 3> needs = {data["needs_dx"].toBool(), data["needs_dA"].toBool(),
                                       data["needs_dB"].toBool()};
    const std::vector<double> scaling = data["scaling"].toDoubleVector();
    const auto [dx, ds, dA, dB] =
        call_backward({optional_of(grads[0]), optional_of(grads[1]), optional_of(grads[2]),
                       saved.tensors[0], optional_of(saved.tensors[1]), saved.A, saved.B, scaling,
                       saved.tensors[2], optional_of(saved.tensors[3]), data["dropout"].toDouble(),
                       data["keep_tap"].toBool(), needs});
    // One gradient per argument of forward, a list counting as its elements.
    variable_list out = {needs[0] ? dx : Tensor(), Tensor(), Tensor(),
                         data["needs_base"].toBool() ? grads[0] : Tensor()};
    for (size_t k = 0; k < saved.A.size(); ++k) out.push_back(needs[1] ? dA[k] : Tensor());
    for (size_t k = 0; k < saved.B.size(); ++k) out.push_back(needs[2] ? dB[k] : Tensor());
    out.emplace_back();                                                    // scaling
    for (int64_t k = 0; k < data["taps"].toInt(); ++k) out.push_back(ds);  // taps
    out.insert(out.end(), 4, Tensor());  // dropout, bits, keep_tap, want_norms
    return out;
  }
};

Outputs adapt_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                       const OptTensor& base_out, at::TensorList A, at::TensorList B,
                       at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                       const OptTensor& bits, bool keep_tap, bool want_norms) {
  refuse_transforms();
  const bool records = at::GradMode::is_enabled();
  RESLORA_CHECK(
      !records || (!requires_grad(weight) && !requires_grad(bias)),
      "[adapt] weight and bias are frozen here; got one that requires grad: call the base "
      "layer yourself and pass its output as base_out");
  if (!records || !(x.requires_grad() || requires_grad(base_out) || any_requires_grad(A) ||
                    any_requires_grad(B) || any_requires_grad(taps))) {
    at::AutoDispatchBelowAutograd guard;
    return call_adapt(
        {x, weight, bias, base_out, A, B, scaling, taps, dropout, bits, keep_tap, want_norms});
  }
  variable_list out = Adapt::apply(x, weight, bias, base_out, A, B, scaling, taps, dropout, bits,
                                   keep_tap, want_norms);
  return {out[0], out[1], out[2], out[3], out[4]};
}

/// First derivatives only: what comes out of adapt_backward refuses to be differentiated again.
class RefuseSecondBackward : public Function<RefuseSecondBackward> {
 public:
  static variable_list forward(AutogradContext*, at::TensorList,
                               const std::function<variable_list()>& compute) {
    return compute();
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "[adapt] a second backward (create_graph=True) through adapt is not supported; "
        "for second derivatives write the layer with reslora's formulas");
  }
};

Gradients backward_autograd(const OptTensor& gy, const OptTensor& gs, const OptTensor& gtap,
                            const Tensor& x, const OptTensor& weight, at::TensorList A,
                            at::TensorList B, at::ArrayRef<double> scaling, const Tensor& s,
                            const OptTensor& bits, double dropout, bool keep_tap,
                            std::array<bool, 3> needs) {
  const BackwardArgs args = {gy,      gs, gtap, x,       weight,   A,    B,
                             scaling, s,  bits, dropout, keep_tap, needs};
  Gradients result;
  const auto compute = [&]() -> variable_list {
    at::AutoDispatchBelowAutograd guard;
    result = call_backward(args);
    auto& [dx, ds, dA, dB] = result;
    variable_list flat = {dx, ds};
    flat.insert(flat.end(), dA.begin(), dA.end());
    flat.insert(flat.end(), dB.begin(), dB.end());
    return flat;
  };
  variable_list inputs = {x, s};
  for (const OptTensor& g : {gy, gs, gtap})
    if (g) inputs.push_back(*g);
  inputs.insert(inputs.end(), A.begin(), A.end());
  inputs.insert(inputs.end(), B.begin(), B.end());
  if (!at::GradMode::is_enabled() || !any_requires_grad(inputs)) {
    compute();
    return result;
  }
  const variable_list flat = RefuseSecondBackward::apply(at::TensorList(inputs), compute);
  auto& [dx, ds, dA, dB] = result;
  dx = flat[0];
  ds = flat[1];
  for (size_t k = 0; k < dA.size(); ++k) dA[k] = flat[2 + k];
  for (size_t k = 0; k < dB.size(); ++k) dB[k] = flat[2 + dA.size() + k];
  return result;
}

/// Tells autograd that the ring was changed in place.
void record_norms_inplace_or_view(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  using Schema = void(const Tensor&, const Tensor&, const Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reslora::record_norms", "").typed<Schema>();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(norms, ring, count);
  }
  for (const Tensor& changed : {ring, count})
    if (!changed.is_inference()) torch::autograd::impl::bump_version(changed);
}

/// Casts x and the base to the autocast dtype; A, B and the taps follow x inside the op.
template <c10::DeviceType device>
Outputs adapt_autocast(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                       const OptTensor& base_out, at::TensorList A, at::TensorList B,
                       at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                       const OptTensor& bits, bool keep_tap, bool want_norms) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const OptTensor& t) -> OptTensor {
    return t ? OptTensor(at::autocast::cached_cast(dtype, *t, device)) : std::nullopt;
  };
  return call_adapt({*cast(x), cast(weight), cast(bias), cast(base_out), A, B, scaling, taps,
                     dropout, bits, keep_tap, want_norms});
}

Outputs adapt_batched(const Tensor&, const OptTensor&, const OptTensor&, const OptTensor&,
                      at::TensorList, at::TensorList, at::ArrayRef<double>, at::TensorList, double,
                      const OptTensor&, bool, bool) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, kNoTransforms);
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, Autograd, m) {
  m.impl("adapt", adapt_autograd);
  m.impl("adapt_backward", backward_autograd);
  m.impl("record_norms", torch::CppFunction::makeFallthrough());  // a statistic has no gradient
}

TORCH_LIBRARY_IMPL(reslora, ADInplaceOrView, m) {
  m.impl("record_norms", record_norms_inplace_or_view);
}

TORCH_LIBRARY_IMPL(reslora, AutocastCPU, m) {
  m.impl("adapt", adapt_autocast<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(reslora, AutocastCUDA, m) {
  m.impl("adapt", adapt_autocast<c10::DeviceType::CUDA>);
}

TORCH_LIBRARY_IMPL(reslora, FuncTorchBatched, m) { m.impl("adapt", adapt_batched); }

}  // namespace reslora::ops
