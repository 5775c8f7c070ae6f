// The passes of a chain: what its layers hand on within one forward, apart for each thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

namespace reslora::detail {

struct Pass {
  std::vector<at::Tensor> taps;  // by position
  int64_t last_position = -1;
  bool is_open = false;
};

/// One pass for each thread that is inside of the chain. A pass that was left unfinished ends with
/// its thread: a later one, to which the system may give the same number, finds nothing of it, and
/// its graph is freed.
class Passes {
 public:
  /// The pass of this thread; only this thread touches it.
  Pass& own();
  /// Ends it.
  void end_own();

  /// What the thread's end needs to know.
  struct Open {
    void end(std::thread::id thread);

    std::mutex mutex;
    std::unordered_map<std::thread::id, Pass> by_thread;
  };

 private:
  std::shared_ptr<Open> open_ = std::make_shared<Open>();
};

}  // namespace reslora::detail
