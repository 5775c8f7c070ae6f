// Names, suffixes and regular expressions of module paths.
#include <reslora/module_names.h>

#include <algorithm>
#include <cctype>
#include <map>
#include <regex>

#include "core/check.h"

namespace reslora {
namespace {

const ExpressionMatch& checked(const ExpressionMatch& match) {
  RESLORA_CHECK(match, "[config] regular expressions need a function that matches them; got none");
  return match;
}

}  // namespace

bool matches_ecma_script(const std::string& expression, const std::string& text) {
  thread_local std::map<std::string, std::regex> compiled;
  auto found = compiled.find(expression);
  if (found == compiled.end()) {
    try {
      found = compiled.emplace(expression, std::regex(expression)).first;
    } catch (const std::regex_error& error) {
      RESLORA_CHECK(false,
                    "[config] a pattern must be a regular expression (ECMAScript); got '{}' ({})",
                    expression, error.what());
    }
  }
  return std::regex_match(text, found->second);
}

bool ModuleNames::is_all_linear() const {
  std::string lower = expression_;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return lower == "all-linear";
}

bool ModuleNames::matches(const std::string& path, const ExpressionMatch& match) const {
  if (is_list_)
    return std::any_of(names_.begin(), names_.end(),
                       [&](const std::string& name) { return is_or_ends_with(path, name); });
  return is_given() && !is_all_linear() && checked(match)(expression_, path);
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

bool matches_pattern(const std::string& path, const std::string& pattern,
                     const ExpressionMatch& match) {
  for (size_t start = 0;; ++start) {
    if (checked(match)(pattern, path.substr(start))) return true;
    start = path.find('.', start);
    if (start == std::string::npos) return false;
  }
}

}  // namespace reslora
