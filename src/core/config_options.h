// Every option of ResLoraConfig by its name: the one list that files, checks and comparisons share.
#pragma once

#include <reslora/config.h>

#include <cstdint>

namespace reslora::detail {

/// Norms of so many forwards take 1 MiB in each layer. A file that asks for more, which may be
/// anybody's, takes nothing.
constexpr int64_t kMaxNormWindow = int64_t{1} << 17;

/// Calls visit(name, values...) for every option, in the order in which files hold them, with its
/// value in each of the configs; these are const to read the values, plain to set them.
template <typename Visit, typename... Configs>
void for_each_option(const Visit& visit, Configs&... configs) {
  visit("r", configs.r()...);
  visit("lora_alpha", configs.lora_alpha()...);
  visit("lora_dropout", configs.lora_dropout()...);
  visit("target_modules", configs.target_modules()...);
  visit("exclude_modules", configs.exclude_modules()...);
  visit("layers_to_transform", configs.layers_to_transform()...);
  visit("layers_pattern", configs.layers_pattern()...);
  visit("rank_pattern", configs.rank_pattern()...);
  visit("alpha_pattern", configs.alpha_pattern()...);
  visit("modules_to_save", configs.modules_to_save()...);
  visit("use_rslora", configs.use_rslora()...);
  visit("init_lora_weights", configs.init_lora_weights()...);
  visit("res_mode", configs.res_mode()...);
  visit("pre_num", configs.pre_num()...);
  visit("merge_method", configs.merge_method()...);
  visit("detach_taps", configs.detach_taps()...);
  visit("norm_window", configs.norm_window()...);
  visit("first_block", configs.first_block()...);
  visit("strict_links", configs.strict_links()...);
}

/// Throws c10::ValueError unless this is a value of init_lora_weights.
void check_initial(const InitLoraWeights& how);

/// `validate` without the names of modules: what a chain needs of its options.
void validate_values(const ResLoraConfig& config);

}  // namespace reslora::detail
