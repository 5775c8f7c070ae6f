// Runs a merged model that Python exported with AOTInductor, without Python.
//
//   deploy model.pt2 values.safetensors   # values: x, and y of the model that was trained
//
// Prints how far the outputs are off, and returns 0 where that is rounding.
#include <fmt/core.h>
#include <reslora/adapter_io.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int count, char** arguments) try {
  if (count != 3) {
    fmt::print(stderr, "usage: deploy model.pt2 values.safetensors\n");
    return 2;
  }
  const torch::NoGradGuard no_grad;
  const reslora::TensorFile values = reslora::load_tensors(arguments[2]);
  const torch::Tensor x = values.tensors.at("x"), y = values.tensors.at("y");
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const torch::Tensor found = model.run({x}).at(0);
  const double error = ((found - y).norm() / y.norm()).item<double>();
  const double limit = y.scalar_type() == torch::kDouble ? 1e-12 : 1e-5;
  fmt::print("output off by {:.1e}\n", error);
  return error <= limit ? 0 : 1;
} catch (const std::exception& error) {
  fmt::print(stderr, "deploy: {}\n", error.what());
  return 1;
}
