// The rules that the options must keep, their names, and how two configs differ.
#include <reslora/config.h>
#include <reslora/merge_rule.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <utility>

#include "core/check.h"
#include "core/config_options.h"
#include "core/names.h"

namespace reslora {
namespace {

constexpr std::array<std::pair<const char*, Shortcut>, 4> kShortcutNames = {{
    {"none", Shortcut::kNone},
    {"is", Shortcut::kIs},
    {"bs", Shortcut::kBs},
    {"ms", Shortcut::kMs},
}};

constexpr std::array<const char*, 3> kFormulaOptions = {"res_mode", "pre_num", "first_block"};

/// The names of the options in which two configs differ.
std::vector<std::string> differences(const ResLoraConfig& a, const ResLoraConfig& b) {
  std::vector<std::string> names;
  detail::for_each_option(
      [&](const char* name, const auto& own, const auto& other) {
        if (!(own == other)) names.emplace_back(name);
      },
      a, b);
  const auto by_name = [](const ResLoraConfig& config) {
    return std::map<std::string, std::string>(config.other_options().begin(),
                                              config.other_options().end());
  };
  const auto own = by_name(a), other = by_name(b);
  for (const auto& [name, value] : own)
    if (const auto at = other.find(name); at == other.end() || at->second != value)
      names.push_back(name);
  for (const auto& item : other)
    if (own.count(item.first) == 0) names.push_back(item.first);
  return names;
}

/// What lora_alpha is divided by.
double divisor_of(int64_t r, bool use_rslora) {
  RESLORA_CHECK(r >= 1, "[config] r must be at least 1; got {}", r);
  const double rank = static_cast<double>(r);
  return use_rslora ? std::sqrt(rank) : rank;
}

void check_list(const char* option, const std::vector<std::string>& names) {
  for (const std::string& name : names)
    RESLORA_CHECK(!name.empty(), "[config] {} must be names; got an empty one", option);
}

void validate_names(const ResLoraConfig& config, const ExpressionMatch& match) {
  const ModuleNames& targets = config.target_modules();
  RESLORA_CHECK(!targets.is_list() || !targets.names().empty(),
                "[config] target_modules must be names or a regular expression; got an empty list");
  check_list("target_modules", targets.names());
  check_list("exclude_modules", config.exclude_modules().names());
  check_list("modules_to_save", config.modules_to_save());
  check_list("layers_pattern", config.layers_pattern());
  targets.matches("", match);  // an expression that cannot be read throws
  config.exclude_modules().matches("", match);
  for (const auto& [pattern, rank] : config.rank_pattern()) {
    matches_pattern("", pattern, match);
    scaling_of(config.lora_alpha(), rank, config.use_rslora());
  }
  for (const auto& [pattern, alpha] : config.alpha_pattern()) {
    matches_pattern("", pattern, match);
    scaling_of(alpha, config.r(), config.use_rslora());
  }
  for (const int64_t index : config.layers_to_transform())
    RESLORA_CHECK(index >= 0, "[config] layers_to_transform must be layer indices; got {}", index);
  RESLORA_CHECK(
      config.layers_pattern().empty() || !config.layers_to_transform().empty(),
      "[config] layers_pattern says which number layers_to_transform means; got it alone");
  RESLORA_CHECK(
      config.layers_to_transform().empty() || !targets.is_given() || targets.is_list() ||
          targets.is_all_linear(),
      "[config] layers_to_transform needs a list of target_modules or 'all-linear'; got the "
      "regular expression '{}' (write the indices into it)",
      targets.expression());
}

}  // namespace

Shortcut parse_shortcut(const std::string& res_mode) {
  for (const auto& [name, shortcut] : kShortcutNames) {
    if (res_mode == name) return shortcut;
  }
  RESLORA_CHECK(false, "[config] res_mode must be {}; got '{}'",
                detail::alternatives(shortcut_names()), res_mode);
}

std::string shortcut_name(Shortcut shortcut) {
  for (const auto& [name, value] : kShortcutNames) {
    if (shortcut == value) return name;
  }
  RESLORA_CHECK(false, "[config] a shortcut must be one of the four of `Shortcut`; got {}",
                static_cast<int>(shortcut));
}

double scaling_of(double lora_alpha, int64_t r, bool use_rslora) {
  const double divisor = divisor_of(r, use_rslora);
  RESLORA_CHECK(std::isfinite(lora_alpha) && lora_alpha > 0,
                "[config] lora_alpha must be finite and greater than 0; got {}", lora_alpha);
  return lora_alpha / divisor;
}

double lora_alpha_of(double scaling, int64_t r, bool use_rslora) {
  return scaling * divisor_of(r, use_rslora);
}

std::vector<std::string> shortcut_names() {
  std::vector<std::string> names;
  for (const auto& item : kShortcutNames) names.emplace_back(item.first);
  return names;
}

std::string first_difference(const ResLoraConfig& a, const ResLoraConfig& b) {
  const std::vector<std::string> names = differences(a, b);
  return names.empty() ? "" : names[0];
}

std::string formula_difference(const ResLoraConfig& a, const ResLoraConfig& b) {
  const std::vector<std::string> names = differences(a, b);
  for (const char* name : kFormulaOptions)
    if (std::find(names.begin(), names.end(), name) != names.end()) return name;
  return "";
}

void detail::check_initial(const InitLoraWeights& how) {
  const auto* name = std::get_if<std::string>(&how);
  RESLORA_CHECK(name == nullptr || *name == "gaussian",
                "[config] init_lora_weights must be true, false or 'gaussian'; got '{}'", *name);
}

void detail::validate_values(const ResLoraConfig& config) {
  scaling_of(config.lora_alpha(), config.r(), config.use_rslora());
  RESLORA_CHECK(config.lora_dropout() >= 0 && config.lora_dropout() < 1,
                "[config] lora_dropout must lie in [0, 1); got {}", config.lora_dropout());
  parse_shortcut(config.res_mode());
  RESLORA_CHECK(config.pre_num() >= -1,
                "[config] pre_num must be -1 (all previous layers), 0 (plain LoRA) or a number of "
                "layers; got {}",
                config.pre_num());
  RESLORA_CHECK(config.first_block() == "double" || config.first_block() == "plain",
                "[config] first_block must be 'double' or 'plain'; got '{}'", config.first_block());
  RESLORA_CHECK(config.norm_window() >= 0 && config.norm_window() <= kMaxNormWindow,
                "[config] norm_window must be 0 (keep no norms) or a number of forwards, at most "
                "{}; got {}",
                kMaxNormWindow, config.norm_window());
  if (!config.merge_method().empty()) parse_merge_rule(config.merge_method(), "config");
  check_initial(config.init_lora_weights());
}

void validate(const ResLoraConfig& config, const ExpressionMatch& match) {
  detail::validate_values(config);
  validate_names(config, match);
}

}  // namespace reslora
