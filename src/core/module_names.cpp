// Names, suffixes and regular expressions of module paths.
#include <reslora/module_names.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <map>
#include <regex>

#include "core/check.h"

namespace reslora {
namespace {

const ExpressionMatch& checked(const ExpressionMatch& match) {
  RESLORA_CHECK(match, "[config] regular expressions need a function that matches them; got none");
  return match;
}

// Bounds of an expression, which may come with somebody's adapter. std::regex recurses by what is
// left of it once braces are written out, and by parentheses.
constexpr size_t kMaxExpanded = 8192;
constexpr size_t kMaxNested = 100;
// What it tries grows with the square of '*', '+', '?', '|' and '{', and with a power of what looks
// ahead within others.
constexpr size_t kMaxRepeated = 200;
constexpr size_t kMaxAhead = 2;

void check_bounded(const std::string& expression) {
  size_t depth = 0, deepest = 0, expanded = expression.size(), repeated = 0;
  std::vector<size_t> ahead;  // the depths at which something looks ahead, and how deep that was
  size_t deepest_ahead = 0;
  for (size_t i = 0; i < expression.size() && expanded <= kMaxExpanded; ++i) {
    const char c = expression[i];
    if (c == '\\') ++i;
    if (c == '[') {  // a set of characters, in which all others stand for themselves
      while (++i < expression.size() && expression[i] != ']')
        if (expression[i] == '\\') ++i;
      continue;
    }
    if (c == '(') {
      deepest = std::max(deepest, ++depth);
      if (expression.compare(i, 3, "(?=") == 0 || expression.compare(i, 3, "(?!") == 0)
        ahead.push_back(depth);
      deepest_ahead = std::max(deepest_ahead, ahead.size());
    }
    if (c == ')' && depth > 0) {
      if (!ahead.empty() && ahead.back() == depth) ahead.pop_back();
      --depth;
    }
    if (c != '\0' && std::strchr("*+?|{", c) != nullptr) ++repeated;
    if (c != '{') continue;
    size_t repeats = 1;  // the larger number of {2,5}
    for (size_t number = 0; ++i < expression.size() && expression[i] != '}';) {
      const bool is_digit = std::isdigit(static_cast<unsigned char>(expression[i])) != 0;
      number = is_digit ? std::min(10 * number + (expression[i] - '0'), kMaxExpanded) : 0;
      repeats = std::max(repeats, number);
    }
    expanded *= repeats;
  }
  RESLORA_CHECK(
      expanded <= kMaxExpanded && deepest <= kMaxNested && repeated <= kMaxRepeated &&
          deepest_ahead <= kMaxAhead,
      "[config] a pattern may have at most {} characters, with all that its braces "
      "repeat, at most {} of '*', '+', '?', '|' and '{{', parentheses at most {} deep, and "
      "at most {} that look ahead within each other; got a larger one that begins with "
      "'{}'",
      kMaxExpanded, kMaxRepeated, kMaxNested, kMaxAhead, expression.substr(0, 40));
}

// Matching in time that grows with the pattern times the text. It takes no back-references.
std::regex compiled(const std::string& expression) {
  check_bounded(expression);
#ifdef __GLIBCXX__
  return std::regex(expression, std::regex::ECMAScript | std::regex_constants::__polynomial);
#else
  return std::regex(expression);
#endif
}

}  // namespace

bool matches_ecma_script(const std::string& expression, const std::string& text) {
  thread_local std::map<std::string, std::regex> known;
  auto found = known.find(expression);
  if (found == known.end()) {
    try {
      found = known.emplace(expression, compiled(expression)).first;
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
