// Saves an adapter: for tests/python/files/test_crashes.py, which lets the program die on the way.
//
//   reslora_saves FOLDER SEED ALPHA NORMS R
//
// The model is three linear layers "0", "1" and "2", 4 -> 4 without bias; its values follow from
// SEED. NORMS is 1 for norm windows of one training forward. Ends with 5 where the save fails.
#include <reslora/adapters.h>
#include <torch/torch.h>

#include <iostream>
#include <string>

namespace {

int save(char** arguments) {
  const auto number = [&](int n) { return std::stoll(arguments[n]); };
  torch::manual_seed(number(2));
  torch::nn::Sequential model;
  for (int n = 0; n < 3; ++n)
    model->push_back(reslora::ResLoraLinear(torch::nn::LinearOptions(4, 4).bias(false)));
  const auto config = reslora::ResLoraConfig()
                          .r(number(5))
                          .lora_alpha(static_cast<double>(number(3)))
                          .target_modules("all-linear");
  const reslora::Adapters adapters = reslora::inject(*model, config);
  {
    const torch::NoGradGuard no_grad;
    for (at::Tensor parameter : adapters.parameters()) parameter.normal_(0, 0.5);
  }
  const bool has_norms = number(4) == 1;
  if (has_norms) model->forward(torch::randn({5, 4})).sum().backward();
  try {
    adapters.save(arguments[1], has_norms);
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 5;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 6) {
    std::cerr << "reslora_saves FOLDER SEED ALPHA NORMS R\n";
    return 2;
  }
  return save(arguments);
}
