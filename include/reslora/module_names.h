/// @file
/// Which modules an option means: names as PEFT writes them, or a regular expression.
///
/// @code{.cpp}
/// reslora::ModuleNames({"q_proj", "v_proj"});  // these names, and paths that end with ".q_proj"
/// reslora::ModuleNames(".*\\.(q|v)_proj");     // a regular expression for the whole path
/// reslora::ModuleNames("all-linear");          // every linear layer
/// @endcode
#pragma once

#include <reslora/export.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace reslora {

/// Tells whether a regular expression matches the whole of a text; throws for an expression that it
/// cannot read. Python hands in its own dialect.
using ExpressionMatch = std::function<bool(const std::string& expression, const std::string& text)>;

/// The ExpressionMatch of C++ programs: ECMAScript without back-references. Throws c10::ValueError
/// for an expression that cannot be read. Each expression is compiled once for each thread.
RESLORA_API bool matches_ecma_script(const std::string& expression, const std::string& text);

/// A list of names, a regular expression, or nothing; see above.
class RESLORA_API ModuleNames {
 public:
  /// Nothing is given.
  ModuleNames() = default;
  /// A list of names and suffixes of whole parts.
  ModuleNames(std::initializer_list<std::string> names) : ModuleNames(std::vector(names)) {}
  /// A list of names and suffixes of whole parts.
  ModuleNames(std::vector<std::string> names) : names_(std::move(names)), is_list_(true) {}
  /// A regular expression (ECMAScript) that must match the whole path, or "all-linear".
  ModuleNames(std::string expression) : expression_(std::move(expression)) {}
  /// A regular expression (ECMAScript) that must match the whole path, or "all-linear".
  ModuleNames(const char* expression) : expression_(expression) {}

  /// False for a default-made one.
  bool is_given() const { return is_list_ || !expression_.empty(); }
  /// True for names, false for an expression.
  bool is_list() const { return is_list_; }
  /// True for "all-linear", in any case of letters.
  bool is_all_linear() const;
  /// The list; empty for an expression.
  const std::vector<std::string>& names() const { return names_; }
  /// The expression; empty for a list.
  const std::string& expression() const { return expression_; }

  /// True where `path` is meant. "all-linear" means no path by itself. Throws as `match` does for
  /// an expression that cannot be read.
  bool matches(const std::string& path, const ExpressionMatch& match = matches_ecma_script) const;
  /// The names in quotes, or the expression, for messages.
  std::string shown() const;

  /// True for the same names in the same order, or the same expression.
  bool operator==(const ModuleNames& other) const {
    return is_list_ == other.is_list_ && names_ == other.names_ && expression_ == other.expression_;
  }

 private:
  std::vector<std::string> names_;
  std::string expression_;
  bool is_list_ = false;
};

/// True where `path` is `name` or ends with "." and `name`.
RESLORA_API bool is_or_ends_with(const std::string& path, const std::string& name);

/// True where the regular expression `pattern` matches all of `path`, or all that follows one of
/// its dots: how the keys of rank_pattern and alpha_pattern are read. Throws as `match` does for a
/// pattern that cannot be read.
RESLORA_API bool matches_pattern(const std::string& path, const std::string& pattern,
                                 const ExpressionMatch& match = matches_ecma_script);

}  // namespace reslora
