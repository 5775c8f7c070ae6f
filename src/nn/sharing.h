// What stands in a model under several names: layers at several places, and tied tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "io/config_lists.h"

namespace reslora {

class ResLoraLinearImpl;

namespace detail {

/// As they are in a model when it is adapted.
struct Sharing {
  OtherNames other_places;  ///< further paths of adapted layers, by layer
  OtherNames tied_layers;   ///< tensors of other modules that share a layer's weight, by layer
  OtherNames tied_heads;    ///< tensors outside of modules_to_save that share one of it, by tensor
};

using Layers = std::vector<std::pair<std::string, std::shared_ptr<ResLoraLinearImpl>>>;

/// Finds them for adapted layers, by name. Tensors share what lies in the same memory, also as
/// views, and a torch::nn::Linear or Embedding reads its member, whatever is registered. An
/// embedding and a head of one tensor are left out of `tied_heads`: merges on files know this pair
/// by what the files hold.
Sharing sharing_in(const torch::nn::Module& model, const Layers& layers,
                   const std::map<std::string, at::Tensor>& heads);

}  // namespace detail
}  // namespace reslora
