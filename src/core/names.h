// Names in sentences.
#pragma once

#include <string>
#include <vector>

#include "core/check.h"

namespace reslora::detail {

/// Two or more names as "'a', 'b' or 'c'".
inline std::string alternatives(const std::vector<std::string>& names) {
  const std::vector<std::string> first(names.begin(), names.end() - 1);
  return fmt::format("'{}' or '{}'", fmt::join(first, "', '"), names.back());
}

}  // namespace reslora::detail
