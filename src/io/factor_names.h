// How files name the A and B of a layer.
#pragma once

#include <string>
#include <string_view>

namespace reslora::detail {

constexpr std::string_view kSuffixA = ".reslora_A.weight";
constexpr std::string_view kSuffixB = ".reslora_B.weight";
constexpr std::string_view kModelPrefix = "base_model.model.";  // of every key in PEFT's files

inline std::string key_of_a(const std::string& layer) { return layer + std::string(kSuffixA); }
inline std::string key_of_b(const std::string& layer) { return layer + std::string(kSuffixB); }

inline bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

/// True for the key of an A or B; everything else in an adapter's file is of a trained head.
inline bool is_factor(std::string_view key) {
  return ends_with(key, kSuffixA) || ends_with(key, kSuffixB);
}

}  // namespace reslora::detail
