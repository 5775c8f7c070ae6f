// Layers, the state that a chain of them shares, and how passes begin and end.
//
// A layer holds its chain's state strongly, the state holds its layers weakly: no cycle, and a
// model that is gone takes its chains along.
#include <reslora/initial_factors.h>
#include <reslora/linear.h>
#include <reslora/ops.h>
#include <torch/nn/functional/linear.h>
#include <torch/nn/init.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "nn/chain_state.h"

namespace reslora {
namespace {

/// Runs `body`; an error that it throws names the layer.
template <typename Body>
auto naming(const std::string& layer, const Body& body) {
  try {
    return body();
  } catch (c10::Error& error) {
    error.add_context("layer " + layer);
    throw;
  }
}

// In the archives of torch::save, beside the parameters.
constexpr const char* kMergedKey = "reslora_merged";
constexpr const char* kNormsKey = "reslora_norms";
constexpr const char* kCountKey = "reslora_norm_count";
constexpr const char* kProductsKey = "reslora_products";
constexpr const char* kFormulaKey = "reslora_formula";

/// What an archive and an adapted layer must agree on beside shapes, for A and B to mean the same.
std::string formula_of(const Chain& chain, int64_t position) {
  const ResLoraConfig& config = chain.config();
  const LayerShape& layer = chain.layer(position);
  std::string formula =
      fmt::format("res_mode {}, pre_num {}, first_block {}, scaling {}", config.res_mode(),
                  config.pre_num(), config.first_block(), layer.scaling);
  if (!layer.left_out.empty())
    formula += fmt::format(", without taps of {}", fmt::join(layer.left_out, " and "));
  return formula;
}

/// A norm window of its own memory.
NormWindow copied(const NormWindow& window, c10::Device device) {
  if (!window.is_defined()) return {};
  const auto on_device = [&](const at::Tensor& tensor) {
    return tensor.to(device, tensor.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  };
  const at::Tensor& products = window.products();
  return {on_device(window.norms()), on_device(window.count()),
          products.defined() ? on_device(products) : products};
}

bool has_rows_of(const at::Tensor& tap, const at::Tensor& x) {
  return tap.defined() && tap.dim() == x.dim() &&
         tap.sizes().slice(0, tap.dim() - 1) == x.sizes().slice(0, x.dim() - 1);
}

}  // namespace

ResLoraLinearImpl::ResLoraLinearImpl(int64_t in_features, int64_t out_features)
    : ResLoraLinearImpl(torch::nn::LinearOptions(in_features, out_features)) {}

ResLoraLinearImpl::ResLoraLinearImpl(const torch::nn::LinearOptions& options_) : options(options_) {
  ResLoraLinearImpl::reset();
}

void ResLoraLinearImpl::reset() {
  RESLORA_CHECK(options.in_features() >= 0 && options.out_features() >= 0,
                "[linear] in_features and out_features must not be negative; got {} and {}",
                options.in_features(), options.out_features());
  weight =
      register_parameter("weight", torch::empty({options.out_features(), options.in_features()}));
  bias = options.bias() ? register_parameter("bias", torch::empty({options.out_features()}))
                        : register_parameter("bias", {}, /*requires_grad=*/false);
  reset_parameters();
  if (is_adapted()) register_adapter(new_adapter(reslora_A.size(0), true));
}

void ResLoraLinearImpl::reset_parameters() {
  torch::NoGradGuard no_grad;
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5));
  if (!bias.defined()) return;
  const double bound = 1 / std::sqrt(static_cast<double>(options.in_features()));
  torch::nn::init::uniform_(bias, -bound, bound);
}

/// A and B as `init` fills them, registered nowhere.
std::pair<at::Tensor, at::Tensor> ResLoraLinearImpl::new_adapter(
    int64_t r, const InitLoraWeights& init) const {
  const torch::NoGradGuard no_grad;
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto made = weight.options().dtype(dtype).requires_grad(false);
  at::Tensor A = torch::empty({r, options.in_features()}, made);
  at::Tensor B = torch::empty({options.out_features(), r}, made);
  fill_factors(A, B, init);
  return {A, B};
}

void ResLoraLinearImpl::register_adapter(const std::pair<at::Tensor, at::Tensor>& adapter) {
  reslora_A = register_parameter("reslora_A", adapter.first);
  reslora_B = register_parameter("reslora_B", adapter.second);
  weight.set_requires_grad(false);
  if (bias.defined()) bias.set_requires_grad(false);
}

bool ResLoraLinearImpl::is_linked() const {
  return is_adapted() && state_->layers[position_].lock().get() == this;
}

const std::string& ResLoraLinearImpl::name() const {
  RESLORA_CHECK(is_adapted(),
                "[linear] a layer has a name once it is linked; got a plain one ({} -> {})",
                options.in_features(), options.out_features());
  return state_->chain.layer(position_).name;
}

void ResLoraLinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "reslora::ResLoraLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias();
  if (is_adapted())
    stream << ", r=" << reslora_A.size(0)
           << ", res_mode=" << shortcut_name(state_->chain.shortcut())
           << ", position=" << position_;
  stream << ")";
}

std::shared_ptr<torch::nn::Module> ResLoraLinearImpl::clone(
    const std::optional<torch::Device>& device) const {
  check_whole("clone");
  auto copy = torch::nn::Cloneable<ResLoraLinearImpl>::clone(device);
  auto& layer = static_cast<ResLoraLinearImpl&>(*copy);
  if (is_adapted()) {
    layer.norms = copied(norms_now(), layer.reslora_A.device());
    layer.forwards_ = forwards_;
    layer.weight.set_requires_grad(weight.requires_grad());
    if (bias.defined()) layer.bias.set_requires_grad(bias.requires_grad());
  }
  return copy;
}

void ResLoraLinearImpl::save(torch::serialize::OutputArchive& archive) const {
  check_whole("save");
  torch::nn::Cloneable<ResLoraLinearImpl>::save(archive);
  if (is_merged_) archive.write(kMergedKey, at::ones({1}));
  if (!is_adapted()) return;
  archive.write(kFormulaKey, c10::IValue(formula_of(state_->chain, position_)));
  const NormWindow window = norms_now();
  if (!window.is_defined()) return;
  archive.write(kNormsKey, window.norms(), /*is_buffer=*/true);
  archive.write(kCountKey, window.count(), /*is_buffer=*/true);
  if (window.products().defined())
    archive.write(kProductsKey, window.products(), /*is_buffer=*/true);
}

void ResLoraLinearImpl::load(torch::serialize::InputArchive& archive) {
  check_whole("load");
  at::Tensor mark;
  const bool is_stored_merged = archive.try_read(kMergedKey, mark);
  RESLORA_CHECK(!is_adapted() || is_stored_merged == is_merged_,
                "[load] a file that torch::save wrote of {} model must be loaded into such a one, "
                "or into a plain one; got the layer {}, which is {}",
                is_stored_merged ? "a merged" : "an unmerged", name(),
                is_merged_ ? "merged" : "not merged");
  check_archived(archive);
  at::Tensor ring, count, products;
  const bool has_norms = is_adapted() && archive.try_read(kNormsKey, ring, /*is_buffer=*/true) &&
                         archive.try_read(kCountKey, count, /*is_buffer=*/true);
  archive.try_read(kProductsKey, products, /*is_buffer=*/true);
  const NormWindow window = has_norms ? NormWindow(ring, count, products) : NormWindow();
  torch::nn::Cloneable<ResLoraLinearImpl>::load(archive);
  if (is_adapted()) set_norms(window);
}

/// torch::load would take tensors of any shape, and those of another formula, and says in its own
/// words what is missing.
void ResLoraLinearImpl::check_archived(torch::serialize::InputArchive& archive) const {
  for (const auto& item : named_parameters(/*recurse=*/false)) {
    at::Tensor stored;
    if (!item.value().defined()) continue;
    const bool is_stored = archive.try_read(item.key(), stored);
    RESLORA_CHECK(is_stored || !is_adapted(),
                  "[load] an archive must hold every tensor of an adapted layer; got no {} for {} "
                  "(load an archive of the plain model before the model is adapted)",
                  item.key(), name());
    if (!is_stored) continue;
    RESLORA_CHECK(stored.sizes() == item.value().sizes(),
                  "[load] an archive must be of the same layer; got {} for {}, which is {}{}",
                  detail::described(stored), item.key(), detail::described(item.value()),
                  is_adapted() ? " (layer " + name() + ")" : "");
  }
  c10::IValue formula;
  if (!is_adapted() || !archive.try_read(kFormulaKey, formula)) return;
  const std::string own = formula_of(state_->chain, position_);
  RESLORA_CHECK(formula.isString() && formula.toStringRef() == own,
                "[load] an archive must be of a layer that computes the same; got {} for {} "
                "(layer {})",
                formula.isString() ? formula.toStringRef() : formula.tagKind(), own, name());
}

NormWindow ResLoraLinearImpl::norms_now() const {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return norms;
}

/// Replaces the norm window; it comes to the device of A.
void ResLoraLinearImpl::set_norms(const NormWindow& window) {
  RESLORA_CHECK(!window.is_defined() || !window.norms().is_meta(),
                "[linear] a norm window must hold values; got one on the meta device (layer {})",
                name());
  const NormWindow own = copied(window, reslora_A.device());
  const int64_t recorded = own.is_defined() ? own.count().item<int64_t>() : 0;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  norms = own;
  forwards_ = recorded;  // so that a training that was resumed adds to sums where it would have
}

bool ResLoraLinearImpl::is_plain() const { return !is_adapted() || !state_->is_enabled; }

/// Refuses a model of which some layers are merged and others are not yet.
void ResLoraLinearImpl::check_whole(const char* op) const {
  RESLORA_CHECK(!is_adapted() || !state_->is_changing,
                "[{}] a model must be whole; got {}, whose chain is being merged, from a callback "
                "of merge",
                op, name());
}

at::Tensor ResLoraLinearImpl::forward(const at::Tensor& x) {
  check_whole("linear");
  if (is_plain()) return torch::nn::functional::linear(x, weight, bias);
  PassCall call = state_->passes.enter(position_);
  const AdaptInput in = input_of(x, call.taps());
  at::Tensor y = take(in, naming(name(), [&] { return adapt(in); }), call.taps());
  state_->passes.leave(call);
  return y;
}

std::pair<at::Tensor, Taps> ResLoraLinearImpl::forward_with_taps(const at::Tensor& x, Taps taps) {
  RESLORA_CHECK(is_adapted(),
                "[linear] forward_with_taps needs a layer that reslora::link adapted");
  check_whole("linear");
  const auto size = static_cast<size_t>(state_->chain.size());
  RESLORA_CHECK(taps.by_position.empty() || taps.by_position.size() == size,
                "[linear] taps must be empty or of the chain, of {} layers; got {} (layer {})",
                size, taps.by_position.size(), name());
  taps.by_position.resize(size);
  const AdaptInput in = input_of(x, taps.by_position);
  at::Tensor y = take(in, naming(name(), [&] { return adapt(in); }), taps.by_position);
  return {std::move(y), std::move(taps)};
}

std::vector<at::Tensor> forward_together(
    const std::vector<std::shared_ptr<ResLoraLinearImpl>>& layers, const at::Tensor& x) {
  std::vector<at::Tensor> y;
  for (const auto& layer : layers)
    RESLORA_CHECK(layer != nullptr, "[linear] forward_together needs layers; got a null pointer");
  for (const auto& layer : layers) layer->check_whole("linear");
  for (size_t k = 0; k < layers.size(); ++k)
    for (size_t j = 0; j < k; ++j)
      RESLORA_CHECK(!layers[k]->is_adapted() || layers[j]->state_ != layers[k]->state_,
                    "[linear] layers that are evaluated together must be of different chains; got "
                    "{} and {} of one",
                    layers[j]->name(), layers[k]->name());
  if (layers.empty() ||
      std::any_of(layers.begin(), layers.end(), [](const auto& l) { return l->is_plain(); })) {
    for (const auto& layer : layers) y.push_back(layer->forward(x));
    return y;
  }
  std::vector<PassCall> calls;
  std::vector<AdaptInput> inputs;
  for (const auto& layer : layers) {
    calls.push_back(layer->state_->passes.enter(layer->position_));
    inputs.push_back(layer->input_of(x, calls.back().taps()));
  }
  const bool want_norms =
      std::any_of(inputs.begin(), inputs.end(), [](const AdaptInput& in) { return in.want_norms; });
  std::vector<AdaptInput> asked = inputs;
  for (AdaptInput& in : asked) in.want_norms = want_norms;
  std::vector<AdaptOutput> out = naming(layers[0]->name(), [&] { return adapt_together(asked); });
  for (size_t k = 0; k < layers.size(); ++k) {
    y.push_back(layers[k]->take(inputs[k], std::move(out[k]), calls[k].taps()));
    layers[k]->state_->passes.leave(calls[k]);
  }
  return y;
}

AdaptInput ResLoraLinearImpl::input_of(const at::Tensor& x,
                                       const std::vector<at::Tensor>& taps) const {
  const Chain& chain = state_->chain;
  const ResLoraConfig& config = chain.config();
  const Wiring& wiring = chain.wiring(position_);
  RESLORA_CHECK(
      is_linked(),
      "[linear] this layer ({}) is a copy that is in no chain; call reslora::relink on the "
      "cloned model",
      name());
  RESLORA_CHECK(detail::is_dense(x), "[adapt] x must be a dense tensor; got {} (layer {})",
                detail::described(x), name());
  AdaptInput in;
  in.x = x;
  in.weight = weight;
  if (bias.defined()) in.bias = bias;
  for (int64_t k : wiring.a) in.A.push_back(state_->layer(k)->reslora_A);
  for (int64_t k : wiring.b) in.B.push_back(state_->layer(k)->reslora_B);
  in.scaling = wiring.scaling;
  for (int64_t k : wiring.taps) {
    if (has_rows_of(taps[k], x)) {
      in.taps.push_back(config.detach_taps() ? taps[k].detach() : taps[k]);
    } else {
      RESLORA_CHECK(!config.strict_links(),
                    "[linear] strict_links demands every link; got {} without one: {} did not run "
                    "before it on as many rows in this pass (begin_forward starts one; without it, "
                    "the first layer of the chain does, and each layer runs once)",
                    name(), chain.layer(k).name);
      if (state_->count_missed(position_)) {
        TORCH_WARN("[linear] ", name(), " ran without its shortcut: ", chain.layer(k).name,
                   " did not run before it on as many rows in this pass; call begin_forward before "
                   "each forward of a model that runs a layer several times, or begins inside of "
                   "the chain (print_links counts what follows)");
      }
    }
  }
  in.dropout = is_training() ? config.lora_dropout() : 0;
  in.keep_tap = wiring.keep_tap;
  in.want_norms = is_training() && torch::GradMode::is_enabled() && config.norm_window() > 0;
  return in;
}

/// The norm window, made by the first of the threads that need it.
NormWindow ResLoraLinearImpl::window_on(c10::Device device) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (!norms.is_defined() || norms.norms().device() != device)
    norms = NormWindow(state_->chain.config().norm_window(), device);
  return norms;
}

/// The sums of products that this forward adds to; undefined where it adds to none.
at::Tensor ResLoraLinearImpl::products_on(c10::Device device, size_t taps) {
  // Exact layers read no taps; a forward that misses one is not what is merged.
  if (taps == 0 || taps != state_->chain.wiring(position_).taps.size()) return {};
  const std::lock_guard<std::mutex> lock(state_->mutex);
  if (forwards_++ % kProductsEvery != 0) return {};
  if (!norms.products().defined()) {
    const int64_t size = 2 * reslora_A.size(0);
    const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
    norms = NormWindow(norms.norms(), norms.count(), at::zeros({size, size}, options));
  }
  return norms.products();
}

/// Takes what belongs to this layer from the op's output; returns y.
at::Tensor ResLoraLinearImpl::take(const AdaptInput& in, AdaptOutput out,
                                   std::vector<at::Tensor>& taps) {
  if (state_->collector) state_->collector->add(state_->collector_index, position_, in.x, out.s);
  if (in.want_norms) {
    const NormWindow window = window_on(in.x.device());
    record_norms(out.norms, window.norms(), window.count());
    const at::Tensor products = products_on(in.x.device(), in.taps.size());
    if (products.defined()) record_products(out.s, in.taps, products, kProductsDecay);
  }
  const Handed handed = state_->chain.wiring(position_).handed;
  if (handed != Handed::kNothing) taps[position_] = handed == Handed::kS ? out.s : out.tap;
  return out.y;
}

}  // namespace reslora
