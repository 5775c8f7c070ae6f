// A C++ program without Python: adapts a three-layer model, trains it one step, merges it.
//
// Prints "ok" and returns 0 where the merged model computes what the adapted one did.
#include <reslora/reslora.h>
#include <torch/torch.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  std::vector<reslora::ResLoraLinear> layers;
  for (int i = 0; i < 3; ++i) layers.emplace_back(16, 16);
  auto chain = reslora::link(layers, reslora::ResLoraConfig().r(4).res_mode("bs"));

  const auto forward = [&](torch::Tensor x) {
    chain.begin_forward();
    for (auto& layer : layers) x = layer->forward(x);
    return x;
  };
  const torch::Tensor x = torch::randn({8, 16});
  torch::optim::SGD optimizer(chain.parameters(), 0.1);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    forward(x).square().mean().backward();
    optimizer.step();
  }

  torch::NoGradGuard no_grad;
  const torch::Tensor adapted = forward(x);
  chain.set_enabled(false);
  const torch::Tensor plain = forward(x);
  reslora::MergePlan plan({chain.view()}, "");
  plan.apply();
  const torch::Tensor merged = forward(x);
  const bool has_trained = !torch::allclose(adapted, plain);
  const bool is_same = torch::allclose(adapted, merged, 1e-4, 1e-5);
  std::cout << (has_trained && is_same ? "ok" : "the merged model differs") << "\n";
  return has_trained && is_same ? 0 : 1;
}
