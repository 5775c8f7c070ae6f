// libFuzzer entry of the container's parser: any bytes are a header that is refused in a sentence
// or one whose tensors lie side by side in the file, and which survives being written again.
//
//   cmake -B build/fuzz -DRESLORA_BUILD_TESTS=ON -DCMAKE_CXX_COMPILER=clang++
//       "-DRESLORA_SANITIZE=fuzzer-no-link;address;undefined"
//   cmake --build build/fuzz --target safetensors_fuzz
//   build/fuzz/tests/fuzz/safetensors_fuzz -max_total_time=60 -max_len=4096 corpus
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "safetensors/safetensors.h"

namespace {

using namespace reslora::detail;

void demand(bool condition) {
  if (!condition) std::abort();
}

void check_file(const unsigned char* bytes, size_t size) {
  const uint64_t length = header_length(bytes, size);
  const std::string_view json(reinterpret_cast<const char*>(bytes) + 8, length);
  const Header header = parse_header(json, size - 8 - length);
  uint64_t at = 0;
  for (const TensorEntry& entry : header.tensors) {
    demand(entry.begin == at && entry.size() == checked_size(entry.shape, entry.dtype));
    at = entry.end;
  }
  demand(at == size - 8 - length);
  const std::string again = serialize_header(header);
  demand(parse_header(std::string_view(again).substr(8), at).tensors.size() ==
         header.tensors.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* bytes, size_t size) {
  try {
    check_file(bytes, size);
  } catch (const ContentError&) {
    return 0;
  }
  return 0;
}
