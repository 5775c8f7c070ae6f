/// @file
/// adapter_config.json: the options of an adapter as text, the same file for C++ and Python.
#pragma once

#include <reslora/config.h>
#include <reslora/export.h>

#include <string>
#include <vector>

namespace reslora {

/// What `peft_type` says in our files.
constexpr const char* kPeftType = "RESLORA";
/// The key of the sum of the weights that an adapter_config.json was saved with. It is no option:
/// who writes a folder adds it (adapter_folder.h).
constexpr const char* kWeightsSumKey = "reslora_sum";

/// Returns the text of an adapter_config.json (peft_type "RESLORA"). Throws c10::ValueError for
/// text that is not UTF-8 and numbers that are not finite.
RESLORA_API std::string config_to_json(const ResLoraConfig& config);

/// Reads what `config_to_json` or Python wrote, and validates it; keys that are no option of C++
/// go to `other_options`. `source` (a path, or "") stands in the sentences of its errors. Throws
/// c10::ValueError for text that is not such a config, of another peft_type, or with a bad value;
/// `match` reads its regular expressions.
RESLORA_API ResLoraConfig config_from_json(const std::string& text,
                                           const std::string& source = "config",
                                           const ExpressionMatch& match = matches_ecma_script);

/// An option of ResLoraConfig, for programs that offer the options under their names.
struct OptionInfo {
  std::string name;          ///< as in ResLoraConfig and in files
  std::string kind;          ///< what it must be, such as "be a whole number"
  std::string default_json;  ///< the default as JSON, such as "8"
};

/// Every option of ResLoraConfig but `other_options`, in the order in which files hold them.
RESLORA_API std::vector<OptionInfo> options();

/// The value of one of those options as JSON. Throws c10::ValueError for another name.
RESLORA_API std::string option_json(const ResLoraConfig& config, const std::string& name);

}  // namespace reslora
