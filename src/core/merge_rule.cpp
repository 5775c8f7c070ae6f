// The names of the merge rules.
#include <reslora/merge_rule.h>

#include <array>
#include <utility>

#include "core/check.h"
#include "core/names.h"

namespace reslora {
namespace {

constexpr std::array<std::pair<const char*, MergeRule>, 7> kNames = {{
    {"exact", MergeRule::kExact},
    {"lsq", MergeRule::kLsq},
    {"projected", MergeRule::kProjected},
    {"input", MergeRule::kInput},
    {"weight", MergeRule::kWeight},
    {"factored", MergeRule::kFactored},
    {"refined", MergeRule::kRefined},
}};

}  // namespace

std::vector<std::string> merge_methods() {
  std::vector<std::string> names;
  for (const auto& [name, rule] : kNames)
    if (rule != MergeRule::kRefined) names.emplace_back(name);
  return names;
}

MergeRule parse_merge_rule(const std::string& merge_method, const std::string& where) {
  for (const auto& [name, rule] : kNames)
    if (merge_method == name && rule != MergeRule::kRefined) return rule;
  RESLORA_CHECK(false,
                "[{}] merge_method must be {}, or not given (the best for what is at hand); "
                "got '{}'",
                where, detail::alternatives(merge_methods()), merge_method);
}

std::string merge_rule_name(MergeRule rule) {
  for (const auto& [name, value] : kNames)
    if (rule == value) return name;
  RESLORA_CHECK(false, "[merge] a rule must be one of those of `MergeRule`; got {}",
                static_cast<int>(rule));
}

}  // namespace reslora
