// The rule for names of experts; see matching.h.
#include <reslora/matching.h>

#include <sstream>

namespace reslora {
namespace {

bool names_experts(const std::string& part) {
  if (part.find("shared") != std::string::npos) return false;
  const size_t end = part.find_last_not_of("0123456789") + 1;
  const bool is_numbered = end > 0 && end < part.size();
  std::string words = part.substr(0, end);
  if (is_numbered && words.back() == '_') words.pop_back();
  const std::string last = words.substr(words.rfind('_') + 1);
  return last == "experts" || (is_numbered && last == "expert");
}

}  // namespace

bool is_in_experts(const std::string& path) {
  std::stringstream parts(path);
  for (std::string part; std::getline(parts, part, '.');)
    if (names_experts(part)) return true;
  return false;
}

}  // namespace reslora
