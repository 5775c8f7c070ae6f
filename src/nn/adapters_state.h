// What the handle of an adapted model shares: chains, trained heads, fits, and a merge.
#pragma once

#include <reslora/adapters.h>
#include <reslora/calibration.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

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
  Fits fits;                                // empty where there are none
  std::string fits_sum;                     // checksum of the adapter that they were made for
  std::unique_ptr<Merge> merge;             // while merged
};

}  // namespace reslora
