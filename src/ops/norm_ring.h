// What `record_norms` shares between devices.
#pragma once

#include <mutex>

namespace reslora::ops {

/// Held while a column is written and counted: threads that train one layer would take the same
/// column otherwise, and one record would be lost. On a device it keeps the kernels of one record
/// together in a stream.
inline std::mutex& ring_mutex() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace reslora::ops
