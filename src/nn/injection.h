// How `inject` finds layers and makes chains of them: all is checked before the model is changed.
#pragma once

#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/config.h>
#include <reslora/linear.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace reslora::detail {

/// A checked injection, nothing of it done yet.
struct Prepared {
  ResLoraConfig config;
  std::vector<std::string> names;                   // of the chains
  std::vector<std::shared_ptr<ChainState>> states;  // parallel to names
  std::map<std::string, at::Tensor> heads;
};

/// Finds layers and chains and checks them; throws as `inject` does. With a file its chains say
/// which layers are meant.
Prepared prepare(torch::nn::Module& model, const ResLoraConfig& config,
                 const AdapterFile* file = nullptr);

/// Does what was prepared: cannot fail for a reason that lies in the model.
std::shared_ptr<Adapters::State> commit(torch::nn::Module& model, Prepared prepared);

}  // namespace reslora::detail
