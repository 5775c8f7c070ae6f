// Calibrates an adapted model of files and saves its fits: for comparison with Python.
//
//   reslora_calibrated FOLDER
//
// Reads base.safetensors (a Net of small_net.h in fp64, with as many blocks as the adapter has
// layers), adapter/, and batches.safetensors, which has x0, x1, ... [batch, tokens, width] and
// mask0, mask1, ... Writes the adapter and its statistics to fitted/.
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/model_files.h>

#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "small_net.h"

namespace reslora {
namespace {

void calibrate(const std::string& folder) {
  testing::Net net(4);
  net->to(torch::kDouble);
  load_base_tensors(*net, load_tensors(folder + "/base.safetensors").tensors);
  const Adapters adapters = load(*net, folder + "/adapter");
  net->eval();
  const auto tensors = load_tensors(folder + "/batches.safetensors").tensors;
  std::vector<std::pair<at::Tensor, at::Tensor>> batches;
  for (size_t k = 0; tensors.count("x" + std::to_string(k)) > 0; ++k)
    batches.emplace_back(tensors.at("x" + std::to_string(k)),
                         tensors.at("mask" + std::to_string(k)));
  adapters.calibrate(
      batches, [&](const auto& batch) { return net->forward(batch.first); },
      [](const auto& batch) { return batch.second; });
  adapters.save(folder + "/fitted", /*statistics=*/true);
}

}  // namespace
}  // namespace reslora

int main(int count, char** words) {
  if (count != 2) return 2;
  try {
    reslora::calibrate(words[1]);
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 1;
  }
  return 0;
}
