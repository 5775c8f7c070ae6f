// Values that come into a model from outside: base tensors that are the model's own, or one tensor
// under two names.
#include <reslora/adapters.h>
#include <torch/torch.h>

#include "nn/small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using testing::kWidth;
using testing::Net;
using testing::refuses;

TEST(BaseTensors, OfTheModelItselfMayTakeEachOthersPlaces) {
  Net net;
  std::map<std::string, at::Tensor> tensors = base_tensors(*net);
  std::swap(tensors.at("layers.0.q_proj.weight"), tensors.at("layers.1.q_proj.weight"));
  tensors.at("layers.2.q_proj.weight") = tensors.at("layers.2.q_proj.weight").detach().t();
  std::map<std::string, at::Tensor> wanted;
  for (const auto& [name, tensor] : tensors) wanted[name] = tensor.detach().clone();
  load_base_tensors(*net, tensors);
  for (const auto& [name, tensor] : base_tensors(*net))
    EXPECT_TRUE(torch::equal(tensor, wanted.at(name))) << name;
}

/// One layer of two names.
struct TwiceImpl : torch::nn::Module {
  TwiceImpl() {
    layer = register_module("layer", torch::nn::Linear(kWidth, 3));
    register_module("other", layer);
  }
  torch::nn::Linear layer{nullptr};
};

TEST(BaseTensors, OfOneTensorUnderTwoNamesMustAgree) {
  TwiceImpl model;
  const at::Tensor before = model.layer->bias.detach().clone();
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : base_tensors(model)) tensors[name] = tensor.detach() + 1;
  ASSERT_EQ(tensors.size(), 4U);
  tensors["other.weight"] = tensors["other.weight"] + 1;
  EXPECT_TRUE(refuses([&] { load_base_tensors(model, tensors); },
                      "layer.weight and other.weight are one tensor of the model and must be given "
                      "the same values"));
  EXPECT_TRUE(torch::equal(before, model.layer->bias));
  tensors["other.weight"] = tensors["layer.weight"].clone();
  load_base_tensors(model, tensors);
  EXPECT_TRUE(torch::equal(before + 1, model.layer->bias));
}

}  // namespace
}  // namespace reslora
