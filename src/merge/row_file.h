// fp32 rows in a temporary file without a name: it is gone when it is closed, however that happens.
//
//   RowFile file(columns);
//   file.append(rows);                              // [T, columns], any number of times
//   file.for_each([&](const at::Tensor& chunk) {}); // in order, at most kChunkRows at a time
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>

namespace reslora::detail {

class RowFile {
 public:
  /// Makes the file in the system's folder for temporary files. Throws c10::Error where it cannot.
  explicit RowFile(int64_t columns);

  void append(const at::Tensor& rows);
  void for_each(const std::function<void(const at::Tensor&)>& visit);

 private:
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  int64_t columns_;
  int64_t rows_ = 0;
};

}  // namespace reslora::detail
