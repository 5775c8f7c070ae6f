// Checks of tensors; see tensor_checks.h.
#include "core/tensor_checks.h"

#include <c10/core/ScalarType.h>

#include <vector>

#include "core/check.h"

namespace reslora::detail {
namespace {

std::string of(const std::string& layer) {
  return layer.empty() ? "" : fmt::format(" (layer {})", layer);
}

bool is_floating_in_memory(const at::Tensor& tensor) {
  return is_dense(tensor) && !tensor.is_meta() && at::isFloatingType(tensor.scalar_type());
}

bool has_sizes(const at::Tensor& tensor, at::IntArrayRef sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != kAny && tensor.sizes()[i] != sizes[i]) return false;
  return true;
}

std::string shown_sizes(at::IntArrayRef sizes) {
  std::vector<std::string> texts;
  for (const int64_t size : sizes) texts.push_back(size == kAny ? "any" : std::to_string(size));
  return fmt::format("[{}]", fmt::join(texts, ", "));
}

}  // namespace

std::string described(const at::Tensor& tensor) {
  if (!tensor.defined()) return "none";
  if (tensor.is_nested()) return "a nested tensor";
  std::string text =
      fmt::format("{} [{}]", c10::toString(tensor.scalar_type()), fmt::join(tensor.sizes(), ", "));
  if (tensor.layout() != at::kStrided) text += " that is not dense";
  if (!tensor.is_cpu()) text += " on " + tensor.device().str();
  return text;
}

bool is_dense(const at::Tensor& tensor) {
  return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_nested();
}

void check_floating(const at::Tensor& tensor, at::IntArrayRef sizes, const char* op,
                    const char* role, const std::string& layer) {
  RESLORA_CHECK(is_floating_in_memory(tensor) && has_sizes(tensor, sizes),
                "[{}] {} must be a dense floating-point tensor {} in memory; got {}{}", op, role,
                shown_sizes(sizes), described(tensor), of(layer));
}

void check_rows(const at::Tensor& tensor, int64_t columns, const char* op, const char* role,
                const std::string& layer) {
  RESLORA_CHECK(is_floating_in_memory(tensor) && tensor.dim() >= 1 &&
                    (columns == kAny || tensor.size(-1) == columns),
                "[{}] {} must be dense floating-point rows [..., {}] in memory; got {}{}", op, role,
                columns == kAny ? "any" : std::to_string(columns), described(tensor), of(layer));
}

}  // namespace reslora::detail
