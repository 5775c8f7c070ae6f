// Adapters as files: saving, loading, exporting; and the tensors of the model around them.
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/calibration.h>
#include <reslora/config_json.h>
#include <reslora/plain_lora.h>
#include <reslora/stage.h>
#include <reslora/statistics_io.h>
#include <torch/utils.h>

#include <algorithm>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "io/folders.h"
#include "nn/adapter_tensors.h"
#include "nn/adapters_state.h"
#include "nn/chain_state.h"
#include "nn/injection.h"

namespace reslora {
namespace detail {

std::map<std::string, at::Tensor> factors_of(const Adapters::State& state) {
  std::map<std::string, at::Tensor> tensors;
  for (const LinkedChain& chain : state.chains) {
    const ChainView view = chain.view();
    for (size_t n = 0; n < view.layers.size(); ++n) {
      const std::string& name = view.chain.layer(static_cast<int64_t>(n)).name;
      tensors.emplace(key_of_a(name), view.layers[n].A.detach());
      tensors.emplace(key_of_b(name), view.layers[n].B.detach());
    }
  }
  return tensors;
}

std::string adapter_sum(const Adapters::State& state) { return tensors_sum(factors_of(state)); }

namespace {

std::vector<ChainRecord> records_of(const Adapters::State& state) {
  std::vector<ChainRecord> records;
  for (size_t i = 0; i < state.chains.size(); ++i)
    records.push_back(record_of(state.names[i], state.chains[i].chain()));
  return records;
}

/// What the file holds: the factors, and the heads.
std::map<std::string, at::Tensor> tensors_of(const Adapters::State& state) {
  std::map<std::string, at::Tensor> tensors = factors_of(state);
  tensors.insert(state.heads.begin(), state.heads.end());
  return tensors;
}

/// The options, with what stands in the model under several names.
std::string config_of(const Adapters::State& state) {
  ResLoraConfig config = state.config;
  auto& options = config.other_options();
  const auto is_list = [](const auto& option) {
    return option.first == kOtherPlaces || option.first == kTiedWeights;  // of a file that was read
  };
  options.erase(std::remove_if(options.begin(), options.end(), is_list), options.end());
  OtherNames tied = state.sharing.tied_layers;
  tied.insert(state.sharing.tied_heads.begin(), state.sharing.tied_heads.end());
  const OtherNames& places = state.sharing.other_places;
  if (!places.empty()) options.emplace_back(kOtherPlaces, listed(places));
  if (!tied.empty()) options.emplace_back(kTiedWeights, listed(tied));
  return config_to_json(config);
}

/// Copies what was checked.
void copy_into(Adapters::State& state, const SavedAdapter& saved) {
  const torch::NoGradGuard no_grad;
  for (auto& [name, tensor] : tensors_of(state)) tensor.copy_(saved.file.tensors.at(name));
  state.fits.clear();
  std::map<std::string, std::vector<int64_t>> left_out;
  for (const ChainRecord& chain : saved.file.chains)
    for (const LayerShape& layer : chain.layers) left_out[layer.name] = layer.left_out;
  for (const LinkedChain& chain : state.chains) {
    auto& fits = state.fits.emplace_back();
    for (int64_t n = 0; n < chain.chain().size(); ++n) {
      const std::string name = chain.chain().layer(n).name;
      if (!left_out[name].empty()) chain.leave_out(n, left_out[name]);
      const auto found = saved.statistics.find(name);
      const LayerStatistics known =
          found == saved.statistics.end() ? LayerStatistics() : found->second;
      chain.set_norms(n, known.norms);
      fits.push_back(known.fit);
    }
  }
  state.fits_sum = adapter_sum(state);
}

}  // namespace
}  // namespace detail

void Adapters::save(const std::string& folder, bool statistics) const {
  AdapterFile file;
  file.config_json = detail::config_of(*state_);
  std::map<std::string, LayerStatistics> known;
  file.chains = detail::records_of(*state_);
  for (size_t i = 0; i < state_->chains.size(); ++i) {
    const ChainView view = state_->chains[i].view();
    for (int64_t n = 0; n < view.chain.size(); ++n) {
      LayerStatistics own;
      if (view.layers[n].norms.is_defined()) own.norms = view.layers[n].norms;
      if (!state_->fits.empty()) own.fit = state_->fits[i][n];
      if (own.norms.is_defined() || own.fit.A.defined())
        known.emplace(view.chain.layer(n).name, std::move(own));
    }
  }
  if (!statistics) known.clear();
  const bool has_fits = std::any_of(known.begin(), known.end(),
                                    [](const auto& item) { return item.second.fit.A.defined(); });
  if (has_fits)
    check_current(state_->fits_sum, detail::adapter_sum(*state_), "save",
                  "save without statistics");
  file.tensors = detail::factors_of(*state_);
  for (const auto& [name, tensor] : state_->heads) file.tensors.emplace(name, tensor.detach());
  Stage stage(folder);
  stage_adapter(stage, file, known);
  stage.commit();
}

void Adapters::load(const std::string& folder) const {
  state_->check_idle("load");
  RESLORA_CHECK(!is_merged(), "[load] the adapters must not be merged; got merged ones (unmerge)");
  const SavedAdapter saved = load_saved_adapter(folder);
  check_formula(state_->config, saved.config);
  check_chains(detail::records_of(*state_), saved.file.chains);
  check_tensors(detail::tensors_of(*state_), saved.file.tensors);
  detail::copy_into(*state_, saved);
}

Adapters load(torch::nn::Module& model, const std::string& folder) {
  const SavedAdapter saved = load_saved_adapter(folder);
  detail::Prepared prepared = detail::prepare(model, saved.config, &saved.file);
  // The chains agree, and so do A and B: `load_adapter` has compared them with the chains.
  std::map<std::string, at::Tensor> tensors = prepared.heads;
  for (const auto& [key, tensor] : saved.file.tensors)
    if (is_factor(key)) tensors.emplace(key, tensor);
  check_tensors(tensors, saved.file.tensors);
  std::shared_ptr<Adapters::State> state = detail::commit(model, std::move(prepared));
  detail::copy_into(*state, saved);
  return Adapters(std::move(state));
}

double Adapters::export_lora(const std::string& folder, const ExportOptions& options) const {
  state_->check_idle("export_lora");
  RESLORA_CHECK(!is_merged() || options.merge_method().empty(),
                "[export_lora] a merged model is exported as it was merged; got merge_method '{}' "
                "(unmerge it first)",
                options.merge_method());
  detail::refuse_other_places(state_->sharing.other_places);
  std::vector<LayerMerge> layers =
      is_merged() ? state_->merge->plan.layers()
                  : plan(options.merge_method(), /*use_affine=*/false).layers();
  double worst = 0;
  for (LayerMerge& layer : layers) {
    if (options.rank() == 0) continue;
    ReducedFactors reduced = reduced_factors(layer, options.rank(), options.tolerance());
    worst = std::max(worst, reduced.error);
    layer = std::move(reduced.layer);
  }
  if (options.rank() > 0) {
    const std::string warning = rank_warning(options.rank(), options.tolerance(), worst);
    if (!warning.empty()) TORCH_WARN(warning);
  }
  PlainLora lora;
  lora.layers = std::move(layers);
  for (const auto& [name, tensor] : state_->heads) lora.heads.emplace(name, tensor.detach());
  lora.modules_to_save = state_->config.modules_to_save();
  lora.base_model_name_or_path = options.base_model_name_or_path();
  lora.task_type = options.task_type();
  save_plain_lora(folder, lora);
  return worst;
}

std::map<std::string, at::Tensor> base_tensors(const torch::nn::Module& model) {
  std::map<std::string, at::Tensor> tensors;
  const auto is_factor = [](const std::string& name) {
    return is_or_ends_with(name, "reslora_A") || is_or_ends_with(name, "reslora_B");
  };
  for (const auto& item : model.named_parameters())
    if (!is_factor(item.key()) && item.value().defined()) tensors.emplace(item.key(), item.value());
  for (const auto& item : model.named_buffers())
    if (item.value().defined()) tensors.emplace(item.key(), item.value());
  return tensors;
}

namespace {

using Tensors = std::map<std::string, at::Tensor>;

/// Refuses what a copy would refuse, and what would be lost: before the first copy.
void check_base_tensors(const Tensors& own, const Tensors& given) {
  using detail::described;
  const auto has_values = [](const at::Tensor& tensor) {
    return detail::is_dense(tensor) && !tensor.is_meta() && !tensor.is_quantized();
  };
  std::map<const void*, std::string> names;  // of a tensor that stands at several places, the first
  for (const auto& [name, tensor] : own) {
    const auto found = given.find(name);
    RESLORA_CHECK(found != given.end(), "[load_base_tensors] the tensor {} is missing", name);
    RESLORA_CHECK(has_values(found->second) && found->second.sizes() == tensor.sizes() &&
                      c10::canCast(found->second.scalar_type(), tensor.scalar_type()),
                  "[load_base_tensors] {} must be a dense tensor in memory like {}; got {}", name,
                  described(tensor), described(found->second));
    RESLORA_CHECK(has_values(tensor) && tensor.is_non_overlapping_and_dense(),
                  "[load_base_tensors] the model must hold tensors that can be written; got {} for "
                  "{}",
                  described(tensor), name);
    const std::string& first = names.emplace(tensor.unsafeGetTensorImpl(), name).first->second;
    const at::Tensor& value = given.at(first);
    RESLORA_CHECK(first == name || value.is_same(found->second) ||
                      at::equal(value, found->second.to(value.options())),
                  "[load_base_tensors] {} and {} are one tensor of the model and must be given the "
                  "same values; got others",
                  first, name);
  }
  for (const auto& item : given)
    RESLORA_CHECK(own.count(item.first) > 0, "[load_base_tensors] the model has no tensor {}",
                  item.first);
}

}  // namespace

void load_base_tensors(torch::nn::Module& model, const std::map<std::string, at::Tensor>& tensors) {
  Tensors own = base_tensors(model), given = tensors;
  check_base_tensors(own, given);
  const torch::NoGradGuard no_grad;
  // A tensor of the model that is given for another one is read before it is written.
  std::set<const void*> written;
  for (const auto& item : own) written.insert(item.second.storage().unsafeGetStorageImpl());
  for (auto& [name, tensor] : given)
    if (!tensor.is_same(own.at(name)) && written.count(tensor.storage().unsafeGetStorageImpl()) > 0)
      tensor = tensor.clone();
  for (auto& [name, tensor] : own) tensor.copy_(given.at(name));
}

}  // namespace reslora
