// The safetensors container in plain structs and bytes, without torch, so that it is fuzzed alone.
//
//   8 bytes: N, little endian | N bytes: JSON header | data: every tensor, C order, little endian
//
//   InputFile file(path);
//   Header header = read_header(file);            // checked against the file's size
//   file.read(buffer, header.tensors[0].size());  // the data follows in the order of `tensors`
//
// The reader trusts no number: N against the file, spans against each other (from 0 to the last
// byte, no hole, no overlap), shape times dtype against the span in checked arithmetic, all before
// anything is allocated for data. The writer makes a temporary file in the same folder, syncs,
// renames and syncs the folder: a crash leaves the old file or the new one. Errors: ContentError
// for what is in a file, FileError for what the system refuses; neither names the path, which the
// caller knows.
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors/json.h"

namespace reslora::detail {

/// The element types that are read and written; any other is refused by its name.
enum class Dtype { kF64, kI64, kF32, kI32, kF16, kBF16, kI16, kF8E4M3, kF8E5M2, kI8, kU8, kBool };

const char* dtype_name(Dtype dtype);
uint64_t dtype_size(Dtype dtype);

struct TensorEntry {
  std::string name;
  Dtype dtype = Dtype::kF32;
  std::vector<int64_t> shape;  // empty: a scalar
  uint64_t begin = 0;          // of the data region
  uint64_t end = 0;

  uint64_t size() const { return end - begin; }
};

struct Header {
  std::vector<TensorEntry> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

constexpr uint64_t kMaxHeader = 100'000'000;  // the format's own limit on N
constexpr size_t kMaxTensors = 65'536;
constexpr size_t kMaxName = 4'096;
constexpr size_t kMaxRank = 16;

/// Returns N from the first 8 bytes of a file of `file_size` bytes (fewer than 8: refused).
uint64_t header_length(const unsigned char* prefix, uint64_t file_size);

/// Parses and checks the N bytes of JSON against the number of bytes that follow them.
Header parse_header(std::string_view json, uint64_t data_size);

/// Returns numel * itemsize; throws ContentError for a negative dimension, a rank beyond the limit
/// and where the product leaves 63 bits (zeros counted as ones, so that strides fit as well).
uint64_t checked_size(const std::vector<int64_t>& shape, Dtype dtype);

/// Orders tensors by falling item size, then by name, and gives them their spans: every tensor is
/// aligned to its item size.
void assign_spans_(Header& header);

/// Returns the first 8 + N bytes of the file, N padded to a multiple of 8 with spaces; throws
/// ContentError for what `parse_header` would not read back.
std::string serialize_header(const Header& header);

/// The system refused something: what, and its reason.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A regular file read from front to back. Not mapped: a map of a file that shrinks is a crash.
class InputFile {
 public:
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  uint64_t size() const { return size_; }
  /// Reads exactly `size` bytes; throws FileError where the file ends first.
  void read(void* out, uint64_t size);

 private:
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

/// Reads and checks the header at the front of `file`, which then stands at the first data byte.
Header read_header(InputFile& file);

/// The system calls of a writer, each as its man page says; tests fail them one by one.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual int stat(const char* path, struct stat* out);
  virtual int fchmod(int descriptor, mode_t mode);
  virtual ssize_t pwrite(int descriptor, const void* data, size_t size, off_t offset);
  virtual int fsync(int descriptor);
  virtual int close(int descriptor);
  virtual int rename(const char* from, const char* to);
  virtual int unlink(const char* path);
};

FileSystem& real_file_system();

/// Syncs a folder, so that the names in it outlast a crash. Throws FileError.
void sync_folder(const std::string& folder, FileSystem& system = real_file_system());

/// Writes a file that appears under its name only when `commit` has returned or failed in its last
/// step, the sync of the folder, which is left to the caller if it says so. Without `commit`
/// nothing of it stays. The mode is 0666 & ~umask, or that of the file it replaces.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path, FileSystem& system = real_file_system());
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Writes at the end of what `write` has written.
  void write(const void* data, uint64_t size);
  /// Writes at an offset; several threads may write at once.
  void write_at(uint64_t offset, const void* data, uint64_t size);
  void commit(bool syncs_folder = true);

 private:
  void create_temporary();

  FileSystem& system_;
  std::string path_;
  std::string temporary_;  // empty where there is none to remove
  int descriptor_ = -1;
  uint64_t position_ = 0;
  bool replaces_ = false;
  mode_t mode_ = 0;  // of the file that is replaced
};

}  // namespace reslora::detail
