/// @file
/// The rules by which shortcuts are merged away, and their names.
#pragma once

#include <reslora/export.h>

#include <string>
#include <vector>

namespace reslora {

/// How a layer's shortcut is replaced.
enum class MergeRule {
  kExact,      ///< none, bs, unlinked layers, the first layer of a chain
  kLsq,        ///< the fit of regression.h
  kProjected,  ///< least squares that sees x through A_n alone, from sums of training forwards
  kInput,      ///< eq. 6-9, 12: ratio of windowed norms
  kWeight,     ///< eq. 10-11, 13: ratio of merged weight norms
  kFactored,   ///< ms: windowed |x|_F on the neighbours' A; the same as kInput for is
  kRefined,    ///< a fit that distillation improved; asked for as "lsq"
};

/// The names that `merge_method` may have: "exact", "lsq", "projected", "input", "weight"
/// and "factored".
RESLORA_API std::vector<std::string> merge_methods();

/// Returns the rule that a name stands for; throws c10::ValueError for a name that is none of
/// `merge_methods`. `where` begins the sentence.
RESLORA_API MergeRule parse_merge_rule(const std::string& merge_method,
                                       const std::string& where = "merge");

/// Returns the name of a rule: one of `merge_methods`, or "refined".
RESLORA_API std::string merge_rule_name(MergeRule rule);

}  // namespace reslora
