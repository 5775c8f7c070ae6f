// Every option of ResLoraConfig by its name: the one list that files, checks and comparisons share.
#pragma once

#include <reslora/config.h>

namespace reslora::detail {

/// Calls visit(name, value) for every option, in the order in which files hold them; `Config` is
/// const to read the values, plain to set them.
template <typename Config, typename Visit>
void for_each_option(Config& config, const Visit& visit) {
  visit("r", config.r());
  visit("lora_alpha", config.lora_alpha());
  visit("lora_dropout", config.lora_dropout());
  visit("target_modules", config.target_modules());
  visit("exclude_modules", config.exclude_modules());
  visit("layers_to_transform", config.layers_to_transform());
  visit("layers_pattern", config.layers_pattern());
  visit("rank_pattern", config.rank_pattern());
  visit("alpha_pattern", config.alpha_pattern());
  visit("modules_to_save", config.modules_to_save());
  visit("use_rslora", config.use_rslora());
  visit("init_lora_weights", config.init_lora_weights());
  visit("res_mode", config.res_mode());
  visit("pre_num", config.pre_num());
  visit("merge_method", config.merge_method());
  visit("detach_taps", config.detach_taps());
  visit("norm_window", config.norm_window());
  visit("first_block", config.first_block());
  visit("strict_links", config.strict_links());
}

/// `validate` without the names of modules: what a chain needs of its options.
void validate_values(const ResLoraConfig& config);

}  // namespace reslora::detail
