/// @file
/// Adapting a LibTorch model by names, and the handle for everything after that.
///
/// @code{.cpp}
/// auto adapters = reslora::inject(
///     *model, reslora::ResLoraConfig().r(8).lora_alpha(16).res_mode("is").target_modules(
///                 {"q_proj", "v_proj"}));
/// torch::optim::AdamW optimizer(adapters.parameters());
/// train(model, optimizer);
/// adapters.save("adapter");      // read by C++ and Python; reslora::load(*model, "adapter")
/// adapters.merge();              // W <- W*; adapters.unmerge() undoes it
/// adapters.export_lora("lora");  // a plain LoRA, read by PEFT
/// @endcode
///
/// The model declares what may be adapted as ResLoraLinear (linear.h): LibTorch cannot replace a
/// torch::nn::Linear from outside. Names, defaults, matching and chains are those of the Python
/// package: layers whose paths differ in the layer index alone ("layers.*.q_proj") form a chain, in
/// the order of registration.
#pragma once

#include <reslora/config.h>
#include <reslora/export.h>
#include <reslora/linear.h>
#include <reslora/merge.h>
#include <reslora/regression.h>
#include <torch/nn/module.h>

#include <functional>
#include <iosfwd>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace reslora {

/// How `Adapters::export_lora` writes.
struct ExportOptions {
  /// As in MergePlan; "": the config's, else the best for what is at hand.
  TORCH_ARG(std::string, merge_method) = "";
  /// Reduce every pair to at most this rank (0: no reduction), to the smallest that keeps
  /// `tolerance`, the relative error |BA - reduced| / |BA|.
  TORCH_ARG(int64_t, rank) = 0;
  /// See `rank`.
  TORCH_ARG(double, tolerance) = 1e-6;
  /// For adapter_config.json.
  TORCH_ARG(std::string, base_model_name_or_path) = "";
  /// For adapter_config.json, such as "CAUSAL_LM".
  TORCH_ARG(std::string, task_type) = "";
};

/// The adapters of one model. A handle: copies mean the same adapters. It holds the layers weakly;
/// keep the model alive. What changes them (merging, loading, calibrating, switching them off) or
/// reads the weights (`plan`, `export_lora`, `of_clone`) throws c10::ValueError when called from a
/// callback of `merge` or `calibrate`.
class RESLORA_API Adapters {
 public:
  struct State;
  /// For the library itself: handles come from `inject` and `load`.
  explicit Adapters(std::shared_ptr<State> state) : state_(std::move(state)) {}

  /// The options that the model was adapted with.
  const ResLoraConfig& config() const;
  /// The chains, in the order of their first layers.
  const std::vector<LinkedChain>& chains() const;
  /// The chains' names, such as "layers.*.q_proj".
  const std::vector<std::string>& names() const;
  /// What trains: A and B of every layer, then the parameters of modules_to_save, each once.
  std::vector<at::Tensor> parameters() const;

  /// Starts a pass of every chain on this thread. Needed only before forwards that may begin inside
  /// a chain or run a layer several times (linear.h): else a pass begins by itself when the first
  /// layer of a chain runs.
  void begin_forward() const;
  /// One line for each chain, each broken link, and each layer that ran without its link.
  std::string links() const;
  /// Prints `links`.
  void print_links(std::ostream& stream) const;
  /// false: the base model alone. Throws c10::ValueError while merged.
  void set_enabled(bool is_enabled) const;

  /// Fits every layer for the rule `lsq`: calls `call(batch)`, which runs the model, for each of
  /// `batches`, as often as the memory of `options` demands (mostly once). Where `call` returns the
  /// model's output as a tensor, the layers whose inputs taps read get half of what these bring,
  /// chain by chain, if the output of the merged model is then nearer (measured on two batches; see
  /// `choose_moves` in calibration.h). The model must be in eval mode; no gradient is taken. The
  /// fits serve `merge` and `export_lora` until the adapter changes. Warns where layers saw fewer
  /// rows than they have features. Throws c10::ValueError for a model in training mode, for
  /// adapters that are switched off and for layers that saw no row; earlier fits are kept then.
  /// Batches must not be padded: see the other form.
  template <typename Batches, typename Call>
  void calibrate(Batches&& batches, const Call& call, const FitOptions& options = {}) const {
    calibrate(
        batches, call, [](const auto&) { return at::Tensor(); }, options);
  }

  /// The same for padded batches: `mask_of(batch)` says where. It returns a mask [batch, tokens],
  /// true or 1 for a token and false or 0 for padding; an undefined one for a batch without
  /// padding; or a std::vector of masks, as an encoder and a decoder have them. Rows of padding are
  /// left out of the fits, and of the output that is compared. Layers whose rows are neither
  /// [batch, tokens] nor [batch * tokens] of a mask are fitted with their padding, and a warning
  /// names one. Throws c10::ValueError for masks that `padding_masks` (calibration.h) refuses, too.
  ///
  /// @code{.cpp}
  /// adapters.calibrate(
  ///     batches, [&](const at::Tensor& ids) { return model->forward(ids); },
  ///     [&](const at::Tensor& ids) { return ids != kPadding; });
  /// @endcode
  template <typename Batches, typename Call, typename MaskOf,
            std::enable_if_t<!std::is_convertible_v<MaskOf, FitOptions>, bool> = true>
  void calibrate(Batches&& batches, const Call& call, const MaskOf& mask_of,
                 const FitOptions& options = {}) const {
    calibrate_with(
        [&](const Visitor& visit) {
          for (auto&& batch : batches)
            visit(
                {[&] { return output_of(call, batch); }, [&] { return as_masks(mask_of(batch)); }});
        },
        options);
  }

  /// The chains' tensors with the fits at hand.
  std::vector<ChainView> views() const;
  /// What merging would do; nothing is changed. Throws as MergePlan does, and where fits were made
  /// before the adapter changed.
  MergePlan plan(const std::string& merge_method = "", bool use_affine = true) const;
  /// Writes W* into the base weights and switches the adapters off; returns the plan, which keeps
  /// the originals on the CPU: a reference that is valid until `unmerge`, and while a handle of
  /// these adapters lives. `progress(done)` is called after each layer; it must not run, copy or
  /// save the model. Throws c10::ValueError where the adapters are merged already or a rule cannot
  /// serve; no weight is then changed.
  const MergePlan& merge(const std::string& merge_method = "",
                         const std::function<void(int64_t)>& progress = nullptr) const;
  /// Restores the exact bits that `merge` replaced. Throws c10::ValueError where nothing is merged.
  void unmerge() const;
  /// True between `merge` and `unmerge`.
  bool is_merged() const;

  /// Writes adapter_config.json and adapter_model.safetensors to a folder, which is made where
  /// there is none; with `statistics` also norm windows and fits, for a merge elsewhere. What lies
  /// there stays whole until all files are written. Throws c10::Error where the system refuses.
  void save(const std::string& folder, bool statistics = false) const;
  /// Reads what `save` or Python's save_pretrained wrote. Everything is checked before the first
  /// value is copied. Throws c10::ValueError for an adapter of another model or other options.
  void load(const std::string& folder) const;
  /// Writes the adapter as plain LoRA in PEFT's format, shortcuts merged away; the model is not
  /// changed. A merged model is exported as it was merged. Returns the largest relative error of
  /// the reduction (0 without `rank`).
  double export_lora(const std::string& folder, const ExportOptions& options = {}) const;

  /// The adapters of a clone of the model (`model->clone()`), linked among themselves, with the
  /// fits at hand. Throws c10::ValueError for the model itself, for a clone of a merged one, for
  /// another model, and as `relink` does; nothing is changed then.
  Adapters of_clone(torch::nn::Module& clone) const;

 private:
  /// One batch, while it is there.
  struct Batch {
    std::function<at::Tensor()> run;                 // calls the model
    std::function<std::vector<at::Tensor>()> masks;  // where it is padded
  };
  using Visitor = std::function<void(const Batch&)>;
  using Pass = std::function<void(const Visitor&)>;  // over all batches

  template <typename Call, typename Item>
  static at::Tensor output_of(const Call& call, Item& batch) {
    if constexpr (std::is_convertible_v<decltype(call(batch)), at::Tensor>) {
      return call(batch);
    } else {
      call(batch);
      return {};
    }
  }

  static std::vector<at::Tensor> as_masks(at::Tensor mask) { return {std::move(mask)}; }
  static std::vector<at::Tensor> as_masks(std::vector<at::Tensor> masks) { return masks; }

  void calibrate_with(const Pass& pass, const FitOptions& options) const;

  std::shared_ptr<State> state_;
};

/// Adapts a model in place: the ResLoraLinear layers that `config` names get A and B, everything
/// but these and modules_to_save is frozen. Step 0 equals the base model.
///
/// Throws c10::ValueError for a bad config, a model that is adapted already, a pattern that matches
/// nothing, a match that is no ResLoraLinear, a torch::nn::Linear above all, and for
/// modules_to_save with a tensor that files cannot hold (complex, empty). The model is then
/// unchanged. A module that is registered under several names has the first of them alone.
RESLORA_API Adapters inject(torch::nn::Module& model, const ResLoraConfig& config);

/// Adapts a plain model by the config of a saved adapter, and loads it. Throws as `inject` and
/// `Adapters::load` do; the model is then unchanged.
RESLORA_API Adapters load(torch::nn::Module& model, const std::string& folder);

/// Parameters and buffers by path, without A and B: what `torch.nn.Module.state_dict` of the
/// Python twin of a plain (or merged) model holds. Write them with `save_tensors`.
RESLORA_API std::map<std::string, at::Tensor> base_tensors(const torch::nn::Module& model);

/// Copies such tensors into a model, whose own tensors may be among them. Throws c10::ValueError
/// for a tensor that is missing, unknown, of another shape, sparse, without values or of a dtype
/// that cannot be cast, and for two names of one tensor that are given other values; nothing is
/// copied then.
RESLORA_API void load_base_tensors(torch::nn::Module& model,
                                   const std::map<std::string, at::Tensor>& tensors);

}  // namespace reslora
