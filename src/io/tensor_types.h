// Element types of safetensors files as torch's, and how errors about files are told.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <string>
#include <utility>

#include "io/folders.h"
#include "safetensors/safetensors.h"

namespace reslora::detail {

at::ScalarType scalar_type(Dtype dtype);

/// The entry (without span) of a tensor that a file can hold; throws ContentError, naming it, for
/// one that is undefined, empty, not dense or of another type.
TensorEntry entry_of(const std::string& name, const at::Tensor& tensor);

/// The bytes of a tensor as a file holds them: plain, C order, on the CPU (no copy where it is so).
at::Tensor file_order(const at::Tensor& tensor);

/// Throws ContentError with a formatted sentence unless `condition` holds.
template <typename... Args>
void require(bool condition, fmt::format_string<Args...> rule, Args&&... args) {
  if (!condition) throw ContentError(fmt::format(rule, std::forward<Args>(args)...));
}

/// Runs `body` and puts operation and path (that of a staged file: where it will be) before the
/// sentences of what it throws: ValueError for content, Error for what the system refused.
template <typename Body>
auto on_file(const char* op, const std::string& path, Body body) {
  try {
    return body();
  } catch (const ContentError& error) {
    C10_THROW_ERROR(ValueError,
                    fmt::format("[{}] {}: {}", op, shown(final_path(path), 4096), error.what()));
  } catch (const FileError& error) {
    C10_THROW_ERROR(Error,
                    fmt::format("[{}] {}: {}", op, shown(final_path(path), 4096), error.what()));
  }
}

}  // namespace reslora::detail
