// The rules that the options must keep, and the names of the shortcuts.
#include <reslora/config.h>

#include <array>
#include <cmath>
#include <utility>

#include "detail/check.h"

namespace reslora {
namespace {

constexpr std::array<std::pair<const char*, Shortcut>, 4> kShortcutNames = {{
    {"none", Shortcut::kNone},
    {"is", Shortcut::kIs},
    {"bs", Shortcut::kBs},
    {"ms", Shortcut::kMs},
}};

}  // namespace

Shortcut parse_shortcut(const std::string& res_mode) {
  for (const auto& [name, shortcut] : kShortcutNames) {
    if (res_mode == name) return shortcut;
  }
  RESLORA_CHECK(false, "[config] res_mode must be 'none', 'is', 'bs' or 'ms'; got '{}'", res_mode);
}

std::string shortcut_name(Shortcut shortcut) {
  for (const auto& [name, value] : kShortcutNames) {
    if (shortcut == value) return name;
  }
  RESLORA_CHECK(false, "[config] a shortcut must be one of the four of `Shortcut`; got {}",
                static_cast<int>(shortcut));
}

double scaling_of(double lora_alpha, int64_t r, bool use_rslora) {
  RESLORA_CHECK(r >= 1, "[config] r must be at least 1; got {}", r);
  RESLORA_CHECK(std::isfinite(lora_alpha) && lora_alpha > 0,
                "[config] lora_alpha must be finite and greater than 0; got {}", lora_alpha);
  const double rank = static_cast<double>(r);
  return lora_alpha / (use_rslora ? std::sqrt(rank) : rank);
}

void validate(const ResLoraConfig& config) {
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
  RESLORA_CHECK(config.norm_window() >= 0,
                "[config] norm_window must be 0 (keep no norms) or a number of forwards; got {}",
                config.norm_window());
}

}  // namespace reslora
