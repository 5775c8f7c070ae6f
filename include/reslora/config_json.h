/// @file
/// adapter_config.json: the options of an adapter as text, the same file for C++ and Python.
#pragma once

#include <reslora/config.h>
#include <reslora/export.h>

#include <string>

namespace reslora {

/// Returns the text of an adapter_config.json (peft_type "RESLORA"). Throws c10::ValueError for
/// text that is not UTF-8 and numbers that are not finite.
RESLORA_API std::string config_to_json(const ResLoraConfig& config);

/// Reads what `config_to_json` or Python wrote, and validates it; keys that are no option of C++
/// go to `other_options`. `source` (a path) begins the sentences of its errors. Throws
/// c10::ValueError for text that is not such a config, of another peft_type, or with a bad value;
/// `match` reads its regular expressions.
RESLORA_API ResLoraConfig config_from_json(const std::string& text,
                                           const std::string& source = "config",
                                           const ExpressionMatch& match = matches_ecma_script);

}  // namespace reslora
