/// @file
/// The options of ResLoRA, with PEFT's names and the same defaults as the Python dataclass.
///
/// @code{.cpp}
/// auto config = reslora::ResLoraConfig().r(8).lora_alpha(16).res_mode("is");
/// reslora::validate(config);  // throws one sentence for the first bad value
/// @endcode
///
/// Source of the meanings: Shi et al., ResLoRA (arXiv 2402.18039).
#pragma once

#include <reslora/export.h>
#include <reslora/module_names.h>
#include <torch/arg.h>

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace reslora {

/// The shortcut between the adapters of consecutive layers of a chain.
enum class Shortcut {
  kNone,  ///< plain LoRA
  kIs,    ///< input shortcut:  B_n A_n (x_n + x_{n-1})
  kBs,    ///< block shortcut:  sum over k of B_{n-k} A_{n-k} x_n
  kMs,    ///< middle shortcut: B_n sum over k of A_{n-k} x_{n-k}
};

/// Values by pattern, in the order in which patterns are tried.
template <typename T>
using Patterns = std::vector<std::pair<std::string, T>>;

/// true, false or "gaussian".
using InitLoraWeights = std::variant<bool, std::string>;

/// The options; setters return the config, so that calls chain.
struct ResLoraConfig {
  /// Rank of A [r, in] and B [out, r].
  TORCH_ARG(int64_t, r) = 8;
  /// Numerator of scaling = lora_alpha / r (or / sqrt(r) with use_rslora).
  TORCH_ARG(double, lora_alpha) = 8;
  /// Probability that an element of x_n is dropped before A; in [0, 1).
  TORCH_ARG(double, lora_dropout) = 0;
  /// "none", "is", "bs" or "ms".
  TORCH_ARG(std::string, res_mode) = "is";
  /// How many previous layers are reached (the paper's m): -1 = all, 0 = plain LoRA. For "is",
  /// which always reaches one, every number but 0 means the same.
  TORCH_ARG(int64_t, pre_num) = 1;
  /// What an "is" chain does in its first layer: "double" takes x_0 for the missing x_{-1}, as the
  /// paper does; "plain" leaves the term out.
  TORCH_ARG(std::string, first_block) = "double";
  /// scaling = lora_alpha / sqrt(r).
  TORCH_ARG(bool, use_rslora) = false;
  /// Number of training forwards whose norms are kept for merging; 0 keeps none; at most 2^24.
  TORCH_ARG(int64_t, norm_window) = 100;
  /// Cut the gradient through the taps (a control experiment).
  TORCH_ARG(bool, detach_taps) = false;
  /// Raise where a link is broken, instead of reporting it; also demands the same in_features and
  /// the same out_features in all layers of a chain.
  TORCH_ARG(bool, strict_links) = false;
  /// How shortcuts are merged away where `merge` is given no rule; "": the best for what is at
  /// hand.
  TORCH_ARG(std::string, merge_method) = "";

  // Which layers `inject` adapts; of no effect where layers are linked by hand.

  /// The layers to adapt; none: what the model calls its queries and values, as in the paper.
  TORCH_ARG(ModuleNames, target_modules);
  /// Layers that are never adapted.
  TORCH_ARG(ModuleNames, exclude_modules);
  /// Adapt only layers whose path has one of these as its first number, and those that
  /// target_modules name by the whole path; empty: all.
  TORCH_ARG(std::vector<int64_t>, layers_to_transform);
  /// The name before the number that counts as a layer's, such as "layers"; empty: the first.
  TORCH_ARG(std::vector<std::string>, layers_pattern);
  /// Regular expression of paths -> another r; the first that matches counts.
  TORCH_ARG(Patterns<int64_t>, rank_pattern);
  /// Regular expression of paths -> another lora_alpha.
  TORCH_ARG(Patterns<double>, alpha_pattern);
  /// Names of modules beside the adapters that train and are saved whole (heads).
  TORCH_ARG(std::vector<std::string>, modules_to_save);
  /// true: A Kaiming-uniform, B zero; "gaussian": A normal with deviation 1/r, B zero; false: both
  /// random (step 0 then differs from the base model).
  TORCH_ARG(InitLoraWeights, init_lora_weights) = true;
  /// Options of a file that only Python knows, as JSON by name: kept, and written back.
  TORCH_ARG(Patterns<std::string>, other_options);
};

/// Throws c10::ValueError with one sentence for the first option out of its range, and what `match`
/// throws for an expression that it cannot read. (Whether names match a model is for `inject` to
/// see.)
RESLORA_API void validate(const ResLoraConfig& config,
                          const ExpressionMatch& match = matches_ecma_script);

/// The name of the first option in which two configs differ, in the order of the files; "" where
/// they are equal. `other_options` are compared by name, whatever their order.
RESLORA_API std::string first_difference(const ResLoraConfig& a, const ResLoraConfig& b);

/// True where every option is the same.
inline bool operator==(const ResLoraConfig& a, const ResLoraConfig& b) {
  return first_difference(a, b).empty();
}
/// The opposite of `==`.
inline bool operator!=(const ResLoraConfig& a, const ResLoraConfig& b) { return !(a == b); }

/// The first of those options in which two configs differ that change what given A and B compute
/// (res_mode, pre_num, first_block); "" where none does.
RESLORA_API std::string formula_difference(const ResLoraConfig& a, const ResLoraConfig& b);

/// What `res_mode` may be: "none", "is", "bs", "ms".
RESLORA_API std::vector<std::string> shortcut_names();

/// Returns the shortcut that `res_mode` names; throws c10::ValueError for an unknown name.
RESLORA_API Shortcut parse_shortcut(const std::string& res_mode);

/// Returns the name of a shortcut as `res_mode` spells it.
RESLORA_API std::string shortcut_name(Shortcut shortcut);

/// Returns lora_alpha / r, or lora_alpha / sqrt(r). Throws c10::ValueError for r < 1 and for a
/// lora_alpha that is not finite and greater than 0.
RESLORA_API double scaling_of(double lora_alpha, int64_t r, bool use_rslora);

/// Returns the lora_alpha whose `scaling_of` is `scaling`. Throws c10::ValueError for r < 1.
RESLORA_API double lora_alpha_of(double scaling, int64_t r, bool use_rslora);

}  // namespace reslora
