/// @file
/// Which layers of a model a config means, and which chains they form. These rules stand here
/// alone: `inject` of C++ and of Python describe their model as a list and ask.
///
/// @code{.cpp}
/// const auto config = reslora::ResLoraConfig().target_modules("all-linear");
/// const reslora::Matching found = reslora::match_layers(modules, config);
/// const auto chains = reslora::find_chains(modules, found.layers, config);
/// @endcode
///
/// Names are matched as PEFT does: a list holds names and suffixes of whole parts, a string is a
/// regular expression for the whole path, "all-linear" means every linear layer but output heads,
/// experts, and layers that are never called; a name of modules_to_save is any end of a path.
#pragma once

#include <reslora/chain.h>
#include <reslora/config.h>
#include <reslora/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace reslora {

/// What the rules ask of one module of a model.
struct ModuleInfo {
  std::string path;          ///< its dotted path; empty for the model itself
  std::string type;          ///< the name of its class, for errors
  int64_t in_features = 0;   ///< of a layer that can be adapted, else 0
  int64_t out_features = 0;  ///< of a layer that can be adapted, else 0
  bool is_linear = false;    ///< a kind of layer that "all-linear" means
  bool is_head = false;      ///< the model names it as its output head
  bool is_bypassed = false;  ///< its weight is read by its parent, which never calls it
  bool is_uniform = false;   ///< a list or sequence whose children are all of one class
  std::string rows = {};     ///< which rows it sees, where layers of one kind see several: "even"
};

/// What a config means in a model.
struct Matching {
  ModuleNames targets;                ///< the target_modules in force: the config's, else defaults
  std::vector<std::string> layers;    ///< paths to adapt, in the order of the modules
  std::vector<std::string> saved;     ///< paths of modules_to_save
  std::vector<std::string> warnings;  ///< one sentence each
};

/// Returns what a model calls its queries and values (or all in one), the targets where a config
/// names none, as in the paper. Throws c10::ValueError where no known names are there.
RESLORA_API std::vector<std::string> default_targets(const std::vector<ModuleInfo>& modules);

/// Returns the layers to adapt; `modules` are all modules in the order of registration. `match`
/// reads the config's regular expressions. Throws c10::ValueError, in a sentence, for a pattern or
/// index that matches nothing, and for a target that cannot be adapted. Cost: modules * patterns.
RESLORA_API Matching match_layers(const std::vector<ModuleInfo>& modules,
                                  const ResLoraConfig& config,
                                  const ExpressionMatch& match = matches_ecma_script);

/// Returns a path without the parts that wrappers of torch put into it: torch.compile, checkpoints
/// and FSDP, as in "layers.0._checkpoint_wrapped_module.lin". Rules and files have plain names.
RESLORA_API std::string plain_name(const std::string& path);

/// True where a part of the path names routed experts ("experts", "local_experts", "expert_0",
/// "experts_3"): they see the tokens that were routed to them, others in each layer, so that no
/// shortcut that hands rows on may link them, and "all-linear" leaves them out. Shared experts see
/// every token ("shared_expert", "shared_experts"), and so does what a model of one expert calls by
/// that name ("action_expert"): these are no experts here.
RESLORA_API bool is_in_experts(const std::string& path);

/// Tells whether layers_to_transform leaves the layer of a path in: where none are given, where its
/// number is one of them, and, as in PEFT, where target_modules holds the whole path.
RESLORA_API bool is_in_layers(const ResLoraConfig& config, const std::string& path);

/// Returns the shortest part of `path` from its start that one of `names` means as modules_to_save
/// does; empty where none does. As in PEFT a name means all modules whose path ends with it: "head"
/// means lm_head too.
RESLORA_API std::string saved_part(const std::string& path, const std::vector<std::string>& names);

/// Returns the layers of a model that the file of an adapter is of: those of its chains, whatever
/// else the config names, and those that the config means in these chains, so that a model with
/// more layers is seen to be another. `heads` are the names of the file's tensors that are no A or
/// B; their modules are `saved`. Throws c10::ValueError where the model has none of the layers.
RESLORA_API Matching match_saved(const std::vector<ModuleInfo>& modules,
                                 const ResLoraConfig& config,
                                 const std::vector<ChainRecord>& chains,
                                 const std::vector<std::string>& heads,
                                 const ExpressionMatch& match = matches_ecma_script);

/// Returns the chains that `layers` (paths among `modules`) form, with the rank and scaling of each
/// layer; a chain's name is the path of its layers with `*` for the index. An index of a path
/// counts as a layer's where the children of its list are all of one class, as in T5's
/// `block.3.layer.1`, a layer of `block.*.layer.1`; without any such, the first number does.
/// Experts see other tokens, and the levels of a UNet have other resolutions: their indices stay.
/// Where taps are handed on (`is`, `ms`), layers with other `rows` form chains of their own, such
/// as "blocks.*.attn.qkv (odd)".
/// Throws c10::ValueError for a path that is none of `modules`.
RESLORA_API std::vector<ChainRecord> find_chains(
    const std::vector<ModuleInfo>& modules, const std::vector<std::string>& layers,
    const ResLoraConfig& config, const ExpressionMatch& match = matches_ecma_script);

/// Returns the rank that a config gives the layer of a path. Throws as `match` does.
RESLORA_API int64_t rank_of(const ResLoraConfig& config, const std::string& path,
                            const ExpressionMatch& match = matches_ecma_script);

/// The rank and the scaling of a layer.
struct RankAndScaling {
  int64_t r = 0;       ///< of rank_pattern, else the config's
  double scaling = 0;  ///< lora_alpha / r, or / sqrt(r), with the layer's own r and lora_alpha
};

/// Returns what a config gives the layer of a path. Throws as `match` does.
RESLORA_API RankAndScaling rank_and_scaling(const ResLoraConfig& config, const std::string& path,
                                            const ExpressionMatch& match = matches_ecma_script);

/// Returns the warning where a shortcut is asked for and no two layers of `chains` are linked, else
/// nothing. Throws c10::ValueError for a null pointer.
RESLORA_API std::string warning_without_links(const std::vector<const Chain*>& chains);

}  // namespace reslora
