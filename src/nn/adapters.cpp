// The handle: passes, links, merging. Files are in adapter_files.cpp, fits in calibrating.cpp.
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/calibration.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <set>
#include <utility>

#include "nn/adapter_tensors.h"
#include "nn/adapters_state.h"
#include "nn/chain_state.h"

namespace reslora {

void Merge::enter(const std::vector<LinkedChain>& chains,
                  const std::function<void(int64_t)>& progress) {
  const auto say = [&](bool is_changing) {
    for (const LinkedChain& chain : chains) chain.state_->is_changing = is_changing;
  };
  say(true);
  try {
    plan.apply(/*keep_originals=*/true, /*safe_merge=*/false, progress);
  } catch (...) {
    say(false);
    throw;
  }
  say(false);
  was_enabled.clear();
  for (const LinkedChain& chain : chains) {
    was_enabled.push_back(chain.is_enabled());
    chain.set_enabled(false);
    chain.mark_merged(true);
  }
}

void Merge::leave(const std::vector<LinkedChain>& chains) {
  plan.revert();
  for (size_t i = 0; i < chains.size(); ++i) {
    chains[i].set_enabled(was_enabled[i]);
    chains[i].mark_merged(false);
  }
}

std::vector<ChainView> detail::views_of(const std::vector<LinkedChain>& chains, const Fits& fits) {
  std::vector<ChainView> all;
  for (size_t i = 0; i < chains.size(); ++i) {
    ChainView& view = all.emplace_back(chains[i].view());
    if (fits.empty()) continue;
    for (size_t n = 0; n < view.layers.size(); ++n) view.layers[n].fit = fits[i][n];
  }
  return all;
}

namespace {

/// True where a layer of the plan is merged by a fit.
bool has_fits(const MergePlan& plan) {
  return std::any_of(plan.layers().begin(), plan.layers().end(), [](const LayerMerge& layer) {
    return layer.rule == MergeRule::kLsq || layer.rule == MergeRule::kRefined;
  });
}

/// The copies of each chain of a handle, in the order of its chains; throws for those of another
/// model.
std::vector<detail::Copies> in_order(std::vector<detail::Copies> copies,
                                     const std::vector<LinkedChain>& chains,
                                     const std::vector<std::string>& names) {
  std::vector<detail::Copies> ordered;
  for (size_t i = 0; i < chains.size(); ++i) {
    const auto own = std::find_if(copies.begin(), copies.end(), [&](const detail::Copies& one) {
      return &one.original->chain == &chains[i].chain();
    });
    RESLORA_CHECK(own != copies.end(),
                  "[of_clone] the model must be a clone of the one that these adapters are of; got "
                  "none of its layers of chain {}",
                  names[i]);
    ordered.push_back(std::move(*own));
    copies.erase(own);
  }
  RESLORA_CHECK(copies.empty(),
                "[of_clone] the model must be a clone of the one that these adapters are of; got "
                "{}, which is adapted but not by them",
                copies[0].original->chain.layer(0).name);
  return ordered;
}

/// The heads of a clone under the names of the model's; throws where it has others.
std::map<std::string, at::Tensor> heads_of(const torch::nn::Module& clone,
                                           const std::map<std::string, at::Tensor>& originals) {
  const std::map<std::string, at::Tensor> tensors = base_tensors(clone);
  std::map<std::string, at::Tensor> heads;
  std::map<const void*, const void*> copies;  // of tensors that stand at several places, too
  for (const auto& [name, original] : originals) {
    const auto found = tensors.find(name);
    RESLORA_CHECK(found != tensors.end() && found->second.sizes() == original.sizes(),
                  "[of_clone] the clone must hold the modules_to_save of the model; got no {} [{}]",
                  name, fmt::join(original.sizes(), ", "));
    const void* copy = found->second.unsafeGetTensorImpl();
    RESLORA_CHECK(copies.emplace(original.unsafeGetTensorImpl(), copy).first->second == copy,
                  "[of_clone] a clone must hold every tensor once; got two copies of {}, since "
                  "LibTorch clones what stands twice in a model twice: make the model anew, and "
                  "load the adapter into it",
                  name);
    heads.insert(*found);
  }
  return heads;
}

}  // namespace

const ResLoraConfig& Adapters::config() const { return state_->config; }
const std::vector<LinkedChain>& Adapters::chains() const { return state_->chains; }
const std::vector<std::string>& Adapters::names() const { return state_->names; }
bool Adapters::is_merged() const { return state_->merge != nullptr; }

std::vector<at::Tensor> Adapters::parameters() const {
  std::vector<at::Tensor> all;
  for (const LinkedChain& chain : state_->chains)
    for (at::Tensor& parameter : chain.parameters()) all.push_back(std::move(parameter));
  // A head that stands at two places is one: an optimizer would move it twice.
  std::set<const void*> seen;
  for (const auto& [name, tensor] : state_->heads)
    if (tensor.requires_grad() && seen.insert(tensor.unsafeGetTensorImpl()).second)
      all.push_back(tensor);
  return all;
}

void Adapters::begin_forward() const {
  for (const LinkedChain& chain : state_->chains) chain.begin_forward();
}

std::string Adapters::links() const {
  std::string text;
  for (size_t i = 0; i < state_->chains.size(); ++i) {
    const LinkedChain& linked = state_->chains[i];
    const Chain& chain = linked.chain();
    int64_t count = 0;
    for (int64_t n = 0; n < chain.size(); ++n) count += chain.is_linked(n);
    text += fmt::format("{}: {}, {} layers, {} linked\n", state_->names[i],
                        shortcut_name(chain.shortcut()), chain.size(), count);
    for (int64_t n = 0; n < chain.size(); ++n) {
      const Wiring& wiring = chain.wiring(n);
      const std::string& name = chain.layer(n).name;
      if (wiring.is_doubled)
        text += fmt::format("  {}: first of its chain, its own input is doubled\n", name);
      for (const std::string& sentence : wiring.broken) text += fmt::format("  {}\n", sentence);
      if (linked.missed_links(n) > 0)
        text += fmt::format(
            "  {}: {} times without a tap that its shortcut reaches (a forward began inside the "
            "chain, layers ran several times without begin_forward, or saw other rows)\n",
            name, linked.missed_links(n));
    }
  }
  return text;
}

void Adapters::print_links(std::ostream& stream) const { stream << links(); }

void Adapters::set_enabled(bool is_enabled) const {
  state_->check_idle("set_enabled");
  RESLORA_CHECK(!is_merged(),
                "[set_enabled] the adapters must not be merged; got merged ones (unmerge first)");
  for (const LinkedChain& chain : state_->chains) chain.set_enabled(is_enabled);
}

std::vector<ChainView> Adapters::views() const {
  return detail::views_of(state_->chains, state_->fits);
}

MergePlan Adapters::plan(const std::string& merge_method, bool use_affine) const {
  state_->check_idle("merge");
  RESLORA_CHECK(!is_merged(), "[merge] adapters must not be merged yet; got merged ones (unmerge)");
  const std::string& method = merge_method.empty() ? state_->config.merge_method() : merge_method;
  MergePlan plan(views(), method, use_affine);
  if (has_fits(plan))
    check_current(state_->fits_sum, detail::adapter_sum(*state_), "merge",
                  "name another merge_method");
  if (plan.fell_back_to_weight()) {
    TORCH_WARN(
        "[merge] the rule 'weight' is taken: there are no fits (calibrate) and no norms of "
        "training forwards (norm_window)");
  }
  return plan;
}

const MergePlan& Adapters::merge(const std::string& merge_method,
                                 const std::function<void(int64_t)>& progress) const {
  detail::refuse_tied(state_->sharing.tied_layers);
  auto made = std::make_unique<Merge>(Merge{plan(merge_method)});
  const Busy busy(*state_, "merge");
  made->enter(state_->chains, progress);
  state_->merge = std::move(made);
  return state_->merge->plan;
}

void Adapters::unmerge() const {
  state_->check_idle("unmerge");
  RESLORA_CHECK(is_merged(), "[unmerge] adapters must be merged; got a model that is not");
  state_->merge->leave(state_->chains);
  state_->merge.reset();
}

Adapters Adapters::of_clone(torch::nn::Module& clone) const {
  state_->check_idle("of_clone");
  const std::vector<detail::Copies> copies =
      in_order(detail::copies_in(clone, "of_clone"), state_->chains, state_->names);
  for (const detail::Copies& chain : copies)
    RESLORA_CHECK(!chain.layers[0]->is_merged(),
                  "[of_clone] the clone must be of an unmerged model; got {} merged: clone before "
                  "merging, or unmerge first",
                  chain.layers[0]->name());
  auto state = std::make_shared<State>();
  state->config = state_->config;
  state->names = state_->names;
  state->fits = state_->fits;
  state->fits_sum = state_->fits_sum;
  state->heads = heads_of(clone, state_->heads);
  for (auto& parameter : clone.parameters()) parameter.set_requires_grad(false);
  for (size_t i = 0; i < copies.size(); ++i) {
    const LinkedChain& chain = state->chains.emplace_back(detail::join_copies(copies[i]));
    if (is_merged()) chain.set_enabled(state_->merge->was_enabled[i]);
    for (at::Tensor& parameter : chain.parameters()) parameter.set_requires_grad(true);
  }
  detail::Layers layers;
  for (size_t i = 0; i < copies.size(); ++i)
    for (size_t n = 0; n < copies[i].layers.size(); ++n)
      layers.emplace_back(copies[i].layers[n]->name(), copies[i].layers[n]);
  state->sharing = detail::sharing_in(clone, layers, state->heads);
  for (auto& [name, head] : state->heads)
    head.set_requires_grad(state_->heads.at(name).requires_grad());
  return Adapters(std::move(state));
}

}  // namespace reslora
