// A safetensors file that is read where it lies, also one that somebody changes meanwhile.
//
// A map of a file that shrinks ends the program by SIGBUS. So the pages that have gone are replaced
// by zeros, by a handler that passes every other such signal on, and whoever has read the file asks
// `check_unchanged` before it uses what it got.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <string>

#include "safetensors/safetensors.h"

namespace reslora::detail {

class MappedFile {
 public:
  /// Maps a file and checks its header. Throws ContentError for a malformed one, FileError where
  /// the system refuses.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const Header& header() const { return header_; }
  /// The first byte behind the header.
  const unsigned char* data() const;
  /// Throws FileError where the file was written to since it was mapped, also under another name.
  /// One that took its place is another file.
  void check_unchanged() const;

 private:
  std::string path_;
  Header header_;
  int descriptor_ = -1;     // to look at the file whatever its name; not kept of a thousand shards
  struct stat found_ = {};  // when it was mapped
  unsigned char* base_ = nullptr;
  uint64_t size_ = 0;
  int slot_ = -1;  // of the ranges that the handler knows; negative: none was free
};

}  // namespace reslora::detail
