// Values that come into a model from outside: archives of torch::save of another formula, and base
// tensors that are the model's own, or one tensor under two names.
#include <reslora/adapters.h>
#include <torch/torch.h>

#include <sstream>

#include "nn/small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using testing::config_of;
using testing::kWidth;
using testing::Net;
using testing::randomise;
using testing::refuses;

/// What torch::save writes of an adapted model.
std::string archive_of(const ResLoraConfig& config) {
  Net net;
  randomise(inject(*net, config));
  std::stringstream stream;
  torch::save(net, stream);
  return stream.str();
}

TEST(Archives, OfAnotherFormulaAreRefused) {
  const ResLoraConfig is = config_of("is");
  const std::string bytes = archive_of(is);
  for (const ResLoraConfig& other :
       {config_of("ms"), config_of("none"), config_of("is").lora_alpha(8),
        config_of("is").pre_num(2), config_of("is").first_block("plain")}) {
    Net net;
    const Adapters adapters = inject(*net, other);
    const at::Tensor x = torch::randn({3, kWidth}), before = net->forward(x);
    std::stringstream stream(bytes);
    EXPECT_TRUE(refuses([&] { torch::load(net, stream); },
                        "must be of a layer that computes the same; got res_mode is, pre_num 1, "
                        "first_block double, scaling 2 for res_mode " +
                            other.res_mode()));
    EXPECT_TRUE(torch::equal(before, net->forward(x)));
  }
}

TEST(Archives, OfTheSameFormulaBringTheirOutputs) {
  for (const char* mode : {"none", "is", "bs", "ms"}) {
    Net net, other, plain;
    const Adapters adapters = inject(*net, config_of(mode)), own = inject(*other, config_of(mode));
    randomise(adapters);
    std::stringstream stream, again;
    torch::save(net, stream);
    again << stream.str();
    torch::load(other, stream);
    const at::Tensor x = torch::randn({3, kWidth});
    EXPECT_TRUE(torch::equal(net->forward(x), other->forward(x))) << mode;
    torch::load(plain, again);  // without the adapter
    adapters.set_enabled(false);
    EXPECT_TRUE(torch::equal(net->forward(x), plain->forward(x))) << mode;
  }
}

TEST(Archives, OfAPlainModelDoNotFitAnAdaptedOne) {
  Net plain, net;
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  std::stringstream stream;
  torch::save(plain, stream);
  EXPECT_TRUE(refuses([&] { torch::load(net, stream); },
                      "must hold every tensor of an adapted layer; got no reslora_A for layers.0"));
}

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
