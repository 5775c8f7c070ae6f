// The passes of a chain: which taps a call of a layer reads, and where it leaves its own.
//
// A pass is one forward in one thread. It counts the calls of each layer and keeps what they hand
// on by number of the call and position: the k-th call of a layer reads what the k-th calls of the
// layers before it left. The rules of beginning and ending stand in linear.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace reslora {

struct Pass {
  std::vector<std::vector<at::Tensor>> taps;  // by number of the call, then by position
  std::vector<int64_t> calls;                 // that were finished, by position
  int64_t furthest = -1;                      // the last position of these
  bool is_asked_for = false;                  // begun by begin_forward, so that calls are exact
  bool is_lost = false;                       // begun by itself, and a layer ran again
};

/// One call of a layer: the pass that it is counted in, and its taps.
struct PassCall {
  std::vector<at::Tensor>& taps() { return has_taps ? pass->taps[number] : outside; }

  int64_t position = 0;
  Pass* pass = nullptr;  // nullptr: no pass is open
  size_t number = 0;     // of the calls of this position
  bool has_taps = false;
  std::vector<at::Tensor> outside = {};  // undefined taps, for a call without
};

/// The open passes of a chain, one for each thread. A pass is changed by its own thread alone.
class Passes {
 public:
  explicit Passes(size_t size) : size_(size) {}

  /// Begins a pass of this thread that counts calls exactly; drops what was open.
  void begin();
  /// Finds the pass that a call of the layer at `position` belongs to.
  PassCall enter(int64_t position);
  /// Counts a call that did not throw, and ends the pass where it was the last.
  void leave(const PassCall& call);

 private:
  /// Names a thread, and is true while it lives. A std::thread::id may name a later thread too.
  using Thread = std::shared_ptr<std::atomic<bool>>;

  static const Thread& this_thread();
  Pass& open(bool is_asked_for, std::vector<Pass>& dropped);

  size_t size_;
  std::mutex mutex_;  // of the map; what a pass holds is freed outside of it
  std::unordered_map<Thread, Pass> passes_;
};

}  // namespace reslora
