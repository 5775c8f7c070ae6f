// What the handle of an adapted model shares: chains, trained heads, fits, and a merge.
#pragma once

#include <reslora/adapters.h>
#include <reslora/calibration.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/check.h"
#include "nn/sharing.h"

namespace reslora {

/// A plan, and what it is put in place of.
struct Merge {
  /// Writes W* and switches the adapters off.
  void enter(const std::vector<LinkedChain>& chains,
             const std::function<void(int64_t)>& progress = nullptr);
  /// Restores the weights and what was switched on.
  void leave(const std::vector<LinkedChain>& chains);

  MergePlan plan;
  std::vector<bool> was_enabled = {};  // by chain
};

/// What the handle shares: chains, trained heads, fits, and the merge that is in the weights.
struct Adapters::State {
  ResLoraConfig config;
  std::vector<std::string> names;  // of the chains
  std::vector<LinkedChain> chains;
  std::map<std::string, at::Tensor> heads;  // parameters and buffers of modules_to_save
  detail::Sharing sharing;                  // what stands in the model under several names
  Fits fits;                                // empty where there are none
  std::string fits_sum;                     // checksum of the adapter that they were made for
  std::unique_ptr<Merge> merge;             // while merged
  const char* running = nullptr;            // what calls back into the user's program: see Busy

  /// Throws c10::ValueError where `op` is called from such a callback, in the middle of a change.
  void check_idle(const char* op) const {
    RESLORA_CHECK(running == nullptr,
                  "[{}] the adapters must not be at work; got a call from a callback of {}", op,
                  running);
  }
};

/// Says that an operation which calls the user's program back is under way, while it lives.
class Busy {
 public:
  Busy(Adapters::State& state, const char* op) : state_(state) { state_.running = op; }
  ~Busy() { state_.running = nullptr; }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  Adapters::State& state_;
};

}  // namespace reslora
