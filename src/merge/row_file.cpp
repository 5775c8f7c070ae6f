// Rows in a temporary file; see row_file.h.
#include "merge/row_file.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <system_error>

namespace reslora::detail {
namespace {

constexpr int64_t kChunkRows = 4096;

std::string reason() { return std::generic_category().message(errno); }

// Not std::tmpfile, which knows no TMPDIR.
std::FILE* open_temporary() {
  const char* folder = std::getenv("TMPDIR");
  std::string path = std::string(folder && *folder ? folder : "/tmp") + "/reslora-rows-XXXXXX";
  const int descriptor = mkstemp(path.data());
  TORCH_CHECK(descriptor >= 0,
              "[calibrate] a temporary file is needed for a layer above "
              "max_cov_bytes, and ",
              path, " cannot be made: ", reason(),
              "; set TMPDIR to another folder, or raise max_cov_bytes");
  unlink(path.c_str());
  return fdopen(descriptor, "w+b");
}

}  // namespace

RowFile::RowFile(int64_t columns) : file_(open_temporary(), &std::fclose), columns_(columns) {}

void RowFile::append(const at::Tensor& rows) {
  const at::Tensor data = rows.to(at::kCPU, at::kFloat).contiguous();
  const auto size = static_cast<size_t>(data.nbytes());
  std::fseek(file_.get(), 0, SEEK_END);
  TORCH_CHECK(std::fwrite(data.const_data_ptr(), 1, size, file_.get()) == size,
              "[calibrate] rows cannot be written to a temporary file: ", reason(),
              "; use fewer batches, set TMPDIR to another folder, or raise max_cov_bytes");
  rows_ += data.size(0);
}

void RowFile::for_each(const std::function<void(const at::Tensor&)>& visit) {
  TORCH_CHECK(std::fflush(file_.get()) == 0 && std::fseek(file_.get(), 0, SEEK_SET) == 0,
              "[calibrate] rows cannot be written to a temporary file: ", reason(),
              "; use fewer batches, set TMPDIR to another folder, or raise max_cov_bytes");
  for (int64_t row = 0; row < rows_; row += kChunkRows) {
    at::Tensor chunk = at::empty({std::min(kChunkRows, rows_ - row), columns_}, at::kFloat);
    const auto size = static_cast<size_t>(chunk.nbytes());
    TORCH_CHECK(std::fread(chunk.mutable_data_ptr(), 1, size, file_.get()) == size,
                "[calibrate] rows cannot be read back from a temporary file: ", reason());
    visit(chunk);
  }
}

}  // namespace reslora::detail
