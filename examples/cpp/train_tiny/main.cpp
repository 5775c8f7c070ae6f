// The whole API on one page: train a small network, adapt it with ResLoRA, merge, save, export.
//
//   train_tiny [none|is|bs|ms] [folder] [float|double]   # default: is, no folder, float
//
// With a folder it writes base.safetensors, adapter/, lora/ and values.safetensors (x, and y of the
// adapted model), which a Python twin of the network loads.
#include <fmt/core.h>
#include <reslora/reslora.h>
#include <torch/torch.h>

#include <string>

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(int64_t width) : up_proj(width, 4 * width), down_proj(4 * width, width) {
    register_module("up_proj", up_proj);
    register_module("down_proj", down_proj);
  }
  torch::Tensor forward(const torch::Tensor& x) { return x + down_proj(torch::gelu(up_proj(x))); }
  reslora::ResLoraLinear up_proj, down_proj;  // was: torch::nn::Linear
};
TORCH_MODULE(Block);

double train(torch::nn::Sequential& net, const std::vector<torch::Tensor>& parameters,
             const torch::Tensor& x, const torch::Tensor& wanted) {
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-3));
  torch::Tensor loss;
  for (int step = 0; step < 200; ++step) {
    optimizer.zero_grad();
    loss = torch::mse_loss(net->forward(x), wanted);
    loss.backward();
    optimizer.step();
  }
  return loss.item<double>();
}

int main(int count, char** arguments) try {
  const std::string res_mode = count > 1 ? arguments[1] : "is";
  const std::string folder = count > 2 ? arguments[2] : "";
  const std::string dtype = count > 3 ? arguments[3] : "float";
  TORCH_CHECK_VALUE(count <= 4 && (dtype == "float" || dtype == "double"),
                    "usage: train_tiny [none|is|bs|ms] [folder] [float|double]");
  const auto config = reslora::ResLoraConfig().r(4).lora_alpha(8).res_mode(res_mode).target_modules(
      {"up_proj", "down_proj"});
  reslora::validate(config);
  torch::manual_seed(0);
  torch::nn::Sequential net;
  for (int n = 0; n < 4; ++n) net->push_back(Block(16));
  net->to(dtype == "double" ? torch::kDouble : torch::kFloat);
  const auto options = net->parameters()[0].options().requires_grad(false);
  const torch::Tensor x = torch::randn({256, 16}, options);
  const auto first = torch::tanh(x.roll(1, 1)), second = torch::tanh(1.2 * x.roll(1, 1) + 0.1);
  fmt::print("pretrained:    loss {:.5f}\n", train(net, net->parameters(), x, first));

  auto adapters = reslora::inject(*net, config);
  fmt::print("{}", adapters.links());
  fmt::print("adapted:       loss {:.5f}\n", train(net, adapters.parameters(), x, second));

  net->eval();
  torch::NoGradGuard no_grad;
  const torch::Tensor y = net->forward(x);
  if (!folder.empty()) {
    adapters.save(folder + "/adapter", /*statistics=*/true);
    adapters.export_lora(folder + "/lora");
    reslora::save_tensors(folder + "/base.safetensors", {reslora::base_tensors(*net), {}});
    reslora::save_tensors(folder + "/values.safetensors", {{{"x", x}, {"y", y}}, {}});
  }
  adapters.calibrate(std::vector{x}, [&](const auto& batch) { return net->forward(batch); });
  adapters.merge();
  const torch::Tensor merged = net->forward(x);
  fmt::print("merged:        loss {:.5f}, output off by {:.1e}\n",
             torch::mse_loss(merged, second).item<double>(),
             ((merged - y).norm() / y.norm()).item<double>());
  return 0;
} catch (const c10::Error& error) {
  fmt::print(stderr, "train_tiny: {}\n", error.what_without_backtrace());
  return 1;
}
