// SHA-256 (FIPS 180-4) of a stream of bytes, for the checksum of adapter files.
//
//   Sha256 hash;
//   hash.update(data, size);       // as often as needed
//   std::string hex = hash.finish();
//
// Guards against damage, not against an attacker: the sum stands in the file that it describes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace reslora::detail {

class Sha256 {
 public:
  void update(const void* data, size_t size);
  /// Returns the digest as 64 lower-case hex digits; the object is spent afterwards.
  std::string finish();

 private:
  void compress(const unsigned char* block);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> pending_{};  // the first bytes of a block that is not full yet
  uint64_t total_ = 0;                       // bytes seen
};

}  // namespace reslora::detail
