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

#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

const c10::TypedOperatorHandle<AdaptSchema>& adapt_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("reslora::adapt", "").typed<AdaptSchema>();
  return op;
}

const c10::TypedOperatorHandle<BackwardSchema>& backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reslora::adapt_backward", "")
                             .typed<BackwardSchema>();
  return op;
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

/// Where the saved tensors lie: x, bits, then the weights, s of each member, A, B.
struct Saved {
  Saved(AutogradContext* ctx, size_t members) : tensors(ctx->get_saved_variables()), list(tensors) {
    const size_t weights = ctx->saved_data["weights"].toInt();
    const size_t a_blocks = ctx->saved_data["a_blocks"].toInt();
    const at::TensorList rest = list.slice(2);
    this->weights = rest.slice(0, weights);
    s = rest.slice(weights, members);
    A = rest.slice(weights + members, a_blocks);
    B = rest.slice(weights + members + a_blocks);
  }
  variable_list tensors;
  at::TensorList list, weights, s, A, B;
};

/// Gradients for every entry of a list, undefined where they are not wanted.
void append(variable_list& out, at::TensorList grads, size_t count) {
  if (grads.empty()) {
    out.insert(out.end(), count, Tensor());
  } else {
    out.insert(out.end(), grads.begin(), grads.end());
  }
}

class Adapt : public Function<Adapt> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, at::TensorList bases,
                               at::IntArrayRef layout, at::TensorList A, at::TensorList B,
                               at::ArrayRef<double> scaling, at::TensorList taps, double dropout,
                               const OptTensor& bits, bool want_norms) {
    at::AutoDispatchBelowAutograd guard;
    variable_list out =
        adapt_op().call(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
    const AdaptArgs args =
        sorted_args(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
    const size_t members = args.members.size();
    ctx->set_materialize_grads(false);
    variable_list constant(out.end() - 2, out.end());  // bits and norms
    for (size_t g = 0; g < members; ++g)
      if (!args.members[g].returns_tap()) constant.push_back(out[3 * g + 2]);
    ctx->mark_non_differentiable(constant);
    // x is read for dA (and, as a shape, for dx); W only for dx; the bits wherever x or dx is
    // masked.
    const bool needs_dx = x.requires_grad();
    variable_list saved = {x, dropout > 0 ? (bits ? *bits : out[3 * members]) : Tensor()};
    for (const Member& member : args.members)
      if (needs_dx && member.weight) saved.push_back(*member.weight);
    ctx->saved_data["weights"] = static_cast<int64_t>(saved.size()) - 2;
    // s as an alias: what saving is interrupted by (checkpointing stops its recompute there) would
    // leave an output in the context, and with it a cycle that keeps the whole graph.
    for (size_t g = 0; g < members; ++g) saved.push_back(out[3 * g + 1].detach());
    saved.insert(saved.end(), A.begin(), A.end());
    saved.insert(saved.end(), B.begin(), B.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["a_blocks"] = static_cast<int64_t>(A.size());
    ctx->saved_data["layout"] = layout.vec();
    ctx->saved_data["scaling"] = scaling.vec();
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["needs_dx"] = needs_dx;
    ctx->saved_data["needs_dA"] = any_requires_grad(A);
    ctx->saved_data["needs_dB"] = any_requires_grad(B);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    auto& data = ctx->saved_data;
    const std::vector<int64_t> layout = data["layout"].toIntVector();
    const size_t members = layout.size() / kLayout;
    const Saved saved(ctx, members);
    const std::vector<double> scaling = data["scaling"].toDoubleVector();
    const std::array<bool, 3> needs = {data["needs_dx"].toBool(), data["needs_dA"].toBool(),
                                       data["needs_dB"].toBool()};
    variable_list given, of_bases;
    std::vector<int64_t> grad_layout;
    size_t weights = 0;
    for (size_t g = 0; g < members; ++g) {
      const int64_t* own = layout.data() + kLayout * g;
      int64_t has = 0;
      for (int k = 0; k < 3; ++k) {  // gy, gs, gtap
        if (!grads[3 * g + k].defined()) continue;
        given.push_back(grads[3 * g + k]);
        has |= int64_t{1} << k;
      }
      if (own[0] != kBaseOut && needs[0]) {
        given.push_back(saved.weights[weights++]);
        has |= kGivenWeight;
      }
      grad_layout.insert(grad_layout.end(), {has, own[1], own[2], own[4]});
      of_bases.push_back(own[0] == kBaseOut ? grads[3 * g] : Tensor());
      if (own[0] == kWeightAndBias) of_bases.emplace_back();
    }
    const Tensor& bits = saved.tensors[1];
    const auto [dx, ds, dA, dB] = backward_op().call(
        given, grad_layout, saved.tensors[0], saved.s, saved.A, saved.B, scaling,
        bits.defined() ? OptTensor(bits) : std::nullopt, data["dropout"].toDouble(), needs);
    // One gradient per argument of forward, a list counting as its elements.
    variable_list out = {needs[0] ? dx : Tensor()};
    append(out, of_bases, of_bases.size());
    out.emplace_back();  // layout
    append(out, dA, saved.A.size());
    append(out, dB, saved.B.size());
    out.emplace_back();  // scaling
    for (size_t g = 0; g < members; ++g) out.insert(out.end(), layout[kLayout * g + 3], ds[g]);
    out.insert(out.end(), 3, Tensor());  // dropout, bits, want_norms
    return out;
  }
};

std::vector<Tensor> adapt_autograd(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                                   at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                                   at::TensorList taps, double dropout, const OptTensor& bits,
                                   bool want_norms) {
  refuse_transforms();
  bool needs_grad = false;
  if (at::GradMode::is_enabled()) {
    const AdaptArgs args =
        sorted_args(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
    for (const Member& member : args.members) {
      RESLORA_CHECK(!(member.weight && member.weight->requires_grad()) &&
                        !(member.bias && member.bias->requires_grad()),
                    "[adapt] weight and bias are frozen here; got one that requires grad: call "
                    "the base layer yourself and pass its output as base_out");
      needs_grad |= member.base_out && member.base_out->requires_grad();
    }
    needs_grad |= x.requires_grad() || any_requires_grad(A) || any_requires_grad(B) ||
                  any_requires_grad(taps);
  }
  if (needs_grad)
    return Adapt::apply(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
  at::AutoDispatchBelowAutograd guard;
  return adapt_op().call(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms);
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

Gradients backward_autograd(at::TensorList given, at::IntArrayRef layout, const Tensor& x,
                            at::TensorList s, at::TensorList A, at::TensorList B,
                            at::ArrayRef<double> scaling, const OptTensor& bits, double dropout,
                            std::array<bool, 3> needs) {
  Gradients result;
  const auto compute = [&]() -> variable_list {
    at::AutoDispatchBelowAutograd guard;
    result = backward_op().call(given, layout, x, s, A, B, scaling, bits, dropout, needs);
    auto& [dx, ds, dA, dB] = result;
    variable_list flat = {dx};
    for (const auto* list : {&ds, &dA, &dB}) flat.insert(flat.end(), list->begin(), list->end());
    return flat;
  };
  variable_list inputs = {x};
  for (const at::TensorList list : {given, s, A, B})
    inputs.insert(inputs.end(), list.begin(), list.end());
  if (!at::GradMode::is_enabled() || !any_requires_grad(inputs)) {
    compute();
    return result;
  }
  const variable_list flat = RefuseSecondBackward::apply(at::TensorList(inputs), compute);
  auto& [dx, ds, dA, dB] = result;
  auto next = flat.begin();
  dx = *next++;
  for (auto* list : {&ds, &dA, &dB})
    for (Tensor& t : *list) t = *next++;
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

/// Casts x and the bases to the autocast dtype; A, B and the taps follow x inside the op.
template <c10::DeviceType device>
std::vector<Tensor> adapt_autocast(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                                   at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                                   at::TensorList taps, double dropout, const OptTensor& bits,
                                   bool want_norms) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  variable_list cast;
  for (const Tensor& base : bases) cast.push_back(at::autocast::cached_cast(dtype, base, device));
  return adapt_op().call(at::autocast::cached_cast(dtype, x, device), cast, layout, A, B, scaling,
                         taps, dropout, bits, want_norms);
}

std::vector<Tensor> adapt_batched(const Tensor&, at::TensorList, at::IntArrayRef, at::TensorList,
                                  at::TensorList, at::ArrayRef<double>, at::TensorList, double,
                                  const OptTensor&, bool) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, kNoTransforms);
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, Autograd, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_autograd);
  m.impl("adapt_backward", backward_autograd);
  m.impl("record_norms", torch::CppFunction::makeFallthrough());  // a statistic has no gradient
}

TORCH_LIBRARY_IMPL(reslora, ADInplaceOrView, m) {
  if (is_second_copy()) return;
  m.impl("record_norms", record_norms_inplace_or_view);
}

TORCH_LIBRARY_IMPL(reslora, AutocastCPU, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_autocast<c10::DeviceType::CPU>);
}
TORCH_LIBRARY_IMPL(reslora, AutocastCUDA, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_autocast<c10::DeviceType::CUDA>);
}

TORCH_LIBRARY_IMPL(reslora, FuncTorchBatched, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_batched);
}

}  // namespace reslora::ops
