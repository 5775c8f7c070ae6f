// Names, suffixes and regular expressions of module paths.
#include <reslora/module_names.h>

#include <algorithm>
#include <cctype>
#include <regex>

#include "core/check.h"

namespace reslora {
namespace {

/// `shown`: what the user wrote.
bool matches_whole(const std::string& path, const std::string& expression,
                   const std::string& shown) {
  try {
    return std::regex_match(path, std::regex(expression));
  } catch (const std::regex_error& error) {
    RESLORA_CHECK(false,
                  "[config] a pattern must be a regular expression (ECMAScript); got '{}' ({})",
                  shown, error.what());
  }
}

}  // namespace

bool ModuleNames::is_all_linear() const {
  std::string lower = expression_;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return lower == "all-linear";
}

bool ModuleNames::matches(const std::string& path) const {
  if (is_list_)
    return std::any_of(names_.begin(), names_.end(),
                       [&](const std::string& name) { return is_or_ends_with(path, name); });
  return is_given() && !is_all_linear() && matches_whole(path, expression_, expression_);
}

std::string ModuleNames::shown() const {
  if (!is_list_) return "'" + expression_ + "'";
  return fmt::format("['{}']", fmt::join(names_, "', '"));
}

bool is_or_ends_with(const std::string& path, const std::string& name) {
  if (path.size() <= name.size()) return path == name;
  const size_t start = path.size() - name.size();
  return path[start - 1] == '.' && path.compare(start, name.size(), name) == 0;
}

bool matches_pattern(const std::string& path, const std::string& pattern) {
  return matches_whole(path, "(.*\\.)?(" + pattern + ")", pattern);
}

}  // namespace reslora
