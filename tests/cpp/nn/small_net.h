// A small model of residual blocks that tests adapt by names.
#pragma once

#include <gtest/gtest.h>
#include <reslora/adapters.h>
#include <torch/torch.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace reslora::testing {

constexpr int64_t kWidth = 8;

struct BlockImpl : torch::nn::Cloneable<BlockImpl> {
  BlockImpl() { reset(); }
  void reset() override {
    q_proj = register_module("q_proj", ResLoraLinear(kWidth, kWidth));
    v_proj = register_module("v_proj",
                             ResLoraLinear(torch::nn::LinearOptions(kWidth, kWidth).bias(false)));
    norm = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth})));
  }
  at::Tensor forward(const at::Tensor& x) {
    return x + v_proj->forward(torch::tanh(q_proj->forward(norm->forward(x))));
  }
  ResLoraLinear q_proj{nullptr}, v_proj{nullptr};
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Block);

struct NetImpl : torch::nn::Cloneable<NetImpl> {
  explicit NetImpl(int64_t layer_count = 4) : count(layer_count) { reset(); }
  void reset() override {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int64_t n = 0; n < count; ++n) layers->push_back(Block());
    head = register_module("head", torch::nn::Linear(kWidth, 3));
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& layer : *layers) x = layer->as<BlockImpl>()->forward(x);
    return head->forward(x);
  }
  int64_t count;
  torch::nn::ModuleList layers{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Net);

inline ResLoraConfig config_of(const std::string& res_mode = "is") {
  return ResLoraConfig().r(2).lora_alpha(4).res_mode(res_mode).target_modules({"q_proj", "v_proj"});
}

inline void randomise(const Adapters& adapters) {
  torch::NoGradGuard no_grad;
  for (at::Tensor parameter : adapters.parameters()) parameter.normal_(0, 0.3);
}

inline std::vector<std::string> adapted_names(const Adapters& adapters) {
  std::vector<std::string> names;
  for (const LinkedChain& chain : adapters.chains())
    for (int64_t n = 0; n < chain.chain().size(); ++n) names.push_back(chain.chain().layer(n).name);
  return names;
}

inline std::string new_folder() {
  std::string name = ::testing::TempDir() + "reslora_XXXXXX";
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  return name;
}

inline double distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm()).item<double>();
}

}  // namespace reslora::testing
