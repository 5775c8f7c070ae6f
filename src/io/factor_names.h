// What the keys of A and B end with in files, and the sum of those tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <string_view>

namespace reslora::detail {

constexpr std::string_view kSuffixA = ".reslora_A.weight";
constexpr std::string_view kSuffixB = ".reslora_B.weight";

inline bool ends_with(std::string_view text, std::string_view suffix) {
  return text.size() >= suffix.size() && text.substr(text.size() - suffix.size()) == suffix;
}

/// `tensors_sum` of the A and B among an adapter's tensors: to whom statistics belong.
std::string sum_of_factors(const std::map<std::string, at::Tensor>& tensors);

}  // namespace reslora::detail
