// What `inject` decides before it changes a model.
#pragma once

#include <reslora/adapters.h>
#include <reslora/config.h>
#include <reslora/linear.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace reslora {

/// Fits of every layer, chain by chain; empty where there are none.
using Fits = std::vector<std::vector<Fit>>;

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
  Fits fits;
  std::string fits_sum;          // checksum of the adapter that they were made for
  std::unique_ptr<Merge> merge;  // while merged
};

namespace detail {

/// A checked injection, nothing of it done yet.
struct Prepared {
  ResLoraConfig config;
  std::vector<std::string> names;                   // of the chains
  std::vector<std::shared_ptr<ChainState>> states;  // parallel to names
  std::map<std::string, at::Tensor> heads;
};

/// The layers of a path's kind: the path with its layer indices replaced by `*`. An index counts
/// as one where the children of its ModuleList or Sequential are all of one class; without any,
/// the first number does.
std::string chain_key(const torch::nn::Module& model,
                      const std::map<std::string, std::shared_ptr<torch::nn::Module>>& modules,
                      const std::string& path);

/// Finds layers and chains and checks them; throws as `inject` does.
Prepared prepare(torch::nn::Module& model, const ResLoraConfig& config);

/// Does what was prepared: cannot fail for a reason that lies in the model.
std::shared_ptr<Adapters::State> commit(torch::nn::Module& model, Prepared prepared);

}  // namespace detail
}  // namespace reslora
