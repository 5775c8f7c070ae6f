// What `inject` decides before it changes a model.
#pragma once

#include <reslora/adapters.h>
#include <reslora/config.h>
#include <reslora/linear.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace reslora {

/// What the handle shares: chains, trained heads, fits, and the plan while merged.
struct Adapters::State {
  ResLoraConfig config;
  std::vector<std::string> names;  // of the chains
  std::vector<LinkedChain> chains;
  std::map<std::string, at::Tensor> heads;  // parameters and buffers of modules_to_save
  std::vector<std::vector<Fit>> fits;       // as the chains; empty where there are none
  std::string fits_sum;                     // checksum of the adapter that they were made for
  std::vector<bool> was_enabled;            // by chain, before the merge
  std::unique_ptr<MergePlan> plan;          // while merged
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
