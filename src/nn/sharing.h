// What stands in a model under several names: layers at several places, and tied tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "io/config_lists.h"

namespace reslora {

struct ChainState;

namespace detail {

/// As they are in a model when it is adapted.
struct Sharing {
  OtherNames other_places;  ///< further paths of adapted layers, by layer
  OtherNames tied_layers;   ///< parameters of other modules that are a layer's weight too, by layer
  OtherNames tied_heads;    ///< tensors outside of modules_to_save that are one of its, by tensor
};

/// Finds them, once the layers are linked. An embedding and a head of one tensor are left out of
/// `tied_heads`: merges on files know this pair by what the files hold.
Sharing sharing_in(const torch::nn::Module& model,
                   const std::vector<std::shared_ptr<ChainState>>& chains,
                   const std::map<std::string, at::Tensor>& heads);

}  // namespace detail
}  // namespace reslora
