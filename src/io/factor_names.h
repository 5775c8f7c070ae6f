// What the keys of A and B end with in files.
#pragma once

#include <string_view>

namespace reslora::detail {

constexpr std::string_view kSuffixA = ".reslora_A.weight";
constexpr std::string_view kSuffixB = ".reslora_B.weight";

inline bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

}  // namespace reslora::detail
