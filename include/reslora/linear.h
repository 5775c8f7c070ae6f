/// @file
/// ResLoraLinear: a drop-in for torch::nn::Linear that can be adapted, and chains of them.
///
/// @code{.cpp}
/// struct Net : torch::nn::Module {
///   Net() {
///     for (int i = 0; i < 4; ++i) blocks->push_back(reslora::ResLoraLinear(64, 64));
///     register_module("blocks", blocks);
///   }
///   torch::nn::ModuleList blocks;
/// };
/// // Adapted by names (adapters.h), or layer by layer in the order of execution:
/// auto chain = reslora::link(layers, reslora::ResLoraConfig().r(8).res_mode("is"));
/// torch::optim::AdamW optimizer(chain.parameters());
/// reslora::MergePlan plan({chain.view()}, "");
/// plan.apply();
/// chain.set_enabled(false);
/// @endcode
///
/// What passes between layers (the taps, T x r each) lives in a *pass*, one per thread and forward.
/// The k-th call of a layer in a pass reads what the k-th calls of the layers that it is wired to
/// handed on, so chunks and streams of tokens keep apart. Where there is no such call, or it saw
/// another number of rows, the layer runs without that tap, which `missed_links` counts. A pass
/// ends, and its taps are freed, when the last layer was called as often as any other.
///
/// A pass begins with `begin_forward()`, or by itself when the first layer of the chain runs. One
/// that begins by itself is of a forward that runs each layer once, in order; the first layer after
/// a later one begins the next. A layer that runs again otherwise may be in another chunk, or in
/// another forward after one that an exception left: the rest of that pass runs without taps. So a
/// model that runs a layer several times, or enters a chain behind its first layer, calls
/// `begin_forward()` before each forward, or hands the taps on itself with `forward_with_taps`.
/// Passes do not nest: a forward within a forward of one chain and thread begins with
/// `begin_forward()`, which ends the outer pass; without it, its calls are taken for chunks of the
/// outer one.
///
/// Several threads may run and train one adapted model at once: each has passes of its own, and no
/// norm record is lost. Linking, merging, loading and moving a model are for one thread while no
/// other runs it. Where a callback of `Adapters::merge` calls, copies or saves a layer whose chain
/// is being merged, that throws c10::ValueError.
#pragma once

#include <reslora/chain.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>
#include <reslora/norm_window.h>
#include <reslora/regression.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/options/linear.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace reslora {

struct AdaptInput;
struct AdaptOutput;
struct ChainState;

/// What layers of one chain hand on within one forward, by position; undefined where nothing was.
struct Taps {
  std::vector<at::Tensor> by_position;  ///< one for each layer of the chain
};

/// The module behind `ResLoraLinear`: torch::nn::Linear's options, parameters and values, plus
/// an adapter once it is linked. It is no torch::nn::Linear: code that looks for linear layers
/// (`module.as<torch::nn::Linear>()`) asks for `as<reslora::ResLoraLinear>()` too.
class RESLORA_API ResLoraLinearImpl : public torch::nn::Cloneable<ResLoraLinearImpl> {
 public:
  /// As torch::nn::Linear, with a bias.
  ResLoraLinearImpl(int64_t in_features, int64_t out_features);
  /// As torch::nn::Linear.
  explicit ResLoraLinearImpl(const torch::nn::LinearOptions& options_);

  /// Makes the parameters anew (LibTorch calls this when it clones).
  void reset() override;
  /// Fills weight and bias as torch::nn::Linear does.
  void reset_parameters();
  /// Prints features, rank, shortcut and position.
  void pretty_print(std::ostream& stream) const override;

  /// Copies the layer. A copy of an adapted layer belongs to no chain until `relink` is called on
  /// the copied model; running it before that throws.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;

  /// What torch::save calls. The file has the norms and the shortcut of an adapted layer, and says
  /// of a merged one that it is.
  void save(torch::serialize::OutputArchive& archive) const override;
  /// What torch::load calls; norms are those of the file, none where it has none. Throws
  /// c10::ValueError where only one of file and adapted layer is merged (the adapter would count
  /// twice, or not at all; a plain layer takes both), where they differ in res_mode, pre_num,
  /// first_block or scaling, and for tensors of another shape, such as another rank. Layers before
  /// this one are loaded then.
  void load(torch::serialize::InputArchive& archive) override;

  /// x: [..., in] -> [..., out]. Plain until linked; then takes and leaves taps in the current
  /// pass.
  at::Tensor forward(const at::Tensor& x);

  /// The same with explicit taps: pass an empty Taps to the first layer of a chain and the returned
  /// one to the next. Touches no pass. Throws c10::ValueError for a layer that is in no chain and
  /// for taps of a chain of another length.
  std::pair<at::Tensor, Taps> forward_with_taps(const at::Tensor& x, Taps taps);

  /// True once the layer is linked.
  bool is_adapted() const { return reslora_A.defined(); }
  /// True while the adapter is merged into the weight by `Adapters::merge`; copies keep it.
  bool is_merged() const { return is_merged_; }
  /// False for a plain layer, and for a copy until `relink`.
  bool is_linked() const;
  /// The path of an adapted layer, for messages. Throws c10::ValueError for a plain one.
  const std::string& name() const;

  /// As torch::nn::Linear's.
  torch::nn::LinearOptions options;
  at::Tensor weight;     ///< [out, in]
  at::Tensor bias;       ///< [out], or undefined
  at::Tensor reslora_A;  ///< [r, in], undefined until linked
  at::Tensor reslora_B;  ///< [out, r], undefined until linked
  NormWindow norms;      ///< filled by training forwards; not to be read while threads train

 private:
  friend struct ChainState;  // joins layers to a chain
  friend class LinkedChain;  // reads and sets norms

  friend RESLORA_API std::vector<at::Tensor> forward_together(
      const std::vector<std::shared_ptr<ResLoraLinearImpl>>& layers, const at::Tensor& x);

  std::pair<at::Tensor, at::Tensor> new_adapter(int64_t r, const InitLoraWeights& init) const;
  void register_adapter(const std::pair<at::Tensor, at::Tensor>& adapter);
  bool is_plain() const;
  void check_whole(const char* op) const;
  AdaptInput input_of(const at::Tensor& x, const std::vector<at::Tensor>& taps) const;
  NormWindow window_on(c10::Device device);
  at::Tensor products_on(c10::Device device, size_t taps);
  NormWindow norms_now() const;
  void set_norms(const NormWindow& window);
  void check_archived(torch::serialize::InputArchive& archive) const;
  at::Tensor take(const AdaptInput& in, AdaptOutput out, std::vector<at::Tensor>& taps);

  std::shared_ptr<ChainState> state_;  // shared by the layers of a chain
  int64_t position_ = 0;
  bool is_merged_ = false;
  int64_t forwards_ = 0;  // whose norms were recorded by this object
};

/// A `ModuleHolder` for `ResLoraLinearImpl`; see `torch::nn::Linear` for how holders behave.
TORCH_MODULE(ResLoraLinear);

/// Evaluates layers that read the same x (q, k and v; gate and up) with one op: they share the
/// down-projection, one dropout mask and one sum in dx. Returns y of each, as `forward` would, and
/// takes part in the passes of their chains. Layers that are not adapted are evaluated apart.
/// Throws c10::ValueError for two layers of one chain and, where all are adapted, for chains with
/// different dropout.
/// Example: auto qkv = forward_together({q.ptr(), k.ptr(), v.ptr()}, x);
RESLORA_API std::vector<at::Tensor> forward_together(
    const std::vector<std::shared_ptr<ResLoraLinearImpl>>& layers, const at::Tensor& x);

/// A chain of ResLoraLinear: the handle for passes, parameters and merging.
class RESLORA_API LinkedChain {
 public:
  /// For the library itself: handles come from `link`, `relink` and `inject`.
  explicit LinkedChain(std::shared_ptr<ChainState> state) : state_(std::move(state)) {}

  /// Order, shapes and links of the layers.
  const Chain& chain() const;
  /// Starts a pass on this thread, in which calls are counted as above; taps of an earlier,
  /// unfinished one are dropped. A program that calls it does so before each forward.
  void begin_forward() const;
  /// A and B of every layer, for an optimizer.
  std::vector<at::Tensor> parameters() const;
  /// The tensors of the chain for MergePlan and for files.
  ChainView view() const;
  /// false: every layer runs as its plain base layer (after a merge, or to compare).
  void set_enabled(bool is_enabled) const;
  /// False between set_enabled(false) and set_enabled(true).
  bool is_enabled() const;
  /// What `ResLoraLinearImpl::is_merged` says of the layers from now on.
  void mark_merged(bool is_merged) const;
  /// Hands what every later forward of a layer reads and what enters its B to `collector`, as the
  /// chain of that index in it; nullptr ends it. The collector must outlive that. Call the model in
  /// eval mode and under NoGradGuard.
  void collect(FitCollector* collector, int64_t index = 0) const;
  // What follows throws c10::ValueError for a position that is none of the chain.

  /// Replaces the norm window of a layer, as a loaded file has it; an undefined one empties it.
  void set_norms(int64_t position, const NormWindow& norms) const;
  /// Lets a layer read no taps of those at `others` (positions before its own) any more, as
  /// `Chain::leave_out`. Call it between two forwards, while no backward is due.
  void leave_out(int64_t position, const std::vector<int64_t>& others) const;
  /// True where a layer is in training mode.
  bool is_training(int64_t position) const;
  /// How often a layer ran without a tap that its shortcut reaches, since linking; the first time
  /// in a chain warns.
  int64_t missed_links(int64_t position) const;

 private:
  friend struct Merge;  // says while weights are written

  std::shared_ptr<ChainState> state_;
};

/// Adapts `layers` (execution order) and links them: registers reslora_A and reslora_B on each,
/// filled as `init_lora_weights` says, freezes weight and bias. Parameters are fp32, or fp64 on an
/// fp64 layer, on the layer's device. `names` are used in messages and files; default "0", "1",
/// .... Throws c10::ValueError for a bad config, an empty holder, a layer that is linked already
/// and a name that stands twice, and changes nothing then.
RESLORA_API LinkedChain link(const std::vector<ResLoraLinear>& layers, const ResLoraConfig& config,
                             std::vector<std::string> names = {});

/// Links the layers of a cloned model among themselves, as their originals were. Returns its
/// chains. Throws c10::ValueError for layers that are linked already, for a part of a chain, and
/// for two copies of one layer, since LibTorch clones what stands twice in a model twice; nothing
/// is linked then.
RESLORA_API std::vector<LinkedChain> relink(torch::nn::Module& model);

}  // namespace reslora
