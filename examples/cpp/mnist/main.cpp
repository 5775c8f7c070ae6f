// Vision transfer as in the paper, small: a deep residual MLP learns the digits 0 to 4, then its
// adapters and a fresh head learn 5 to 9. Prints accuracies by shortcut and m, before and after
// merging.
//
//   mnist --data FOLDER      # t10k-images-idx3-ubyte(.gz) and t10k-labels-idx1-ubyte(.gz)
//
// --part train takes MNIST's training files. A ninth of the rows is held out.
#include <reslora/reslora.h>
#include <torch/torch.h>

#include "../common/program.h"
#include "digits.h"

namespace {

struct NetImpl : torch::nn::Module {
  NetImpl(int64_t width, int64_t layer_count) : entry(784, width), head(width, 5) {
    register_module("entry", entry);
    register_module("layers", layers);
    register_module("head", head);
    for (int64_t n = 0; n < layer_count; ++n)
      layers->push_back(reslora::ResLoraLinear(width, width));
  }
  torch::Tensor forward(const torch::Tensor& images) {
    torch::Tensor x = entry->forward(images);
    for (const auto& layer : *layers)
      x = x + torch::gelu(layer->as<reslora::ResLoraLinear>()->forward(x)) / 4;
    return head->forward(x);
  }
  torch::nn::Linear entry, head;
  torch::nn::ModuleList layers;
};
TORCH_MODULE(Net);

double accuracy(Net& net, const Digits& digits, int64_t first_label) {
  const torch::NoGradGuard no_grad;
  const auto found = net->forward(digits.images).argmax(1) + first_label;
  return (found == digits.labels).to(torch::kDouble).mean().item<double>();
}

void train(const std::string& name, Net& net, const std::vector<torch::Tensor>& parameters,
           const Digits& digits, int64_t first_label, int64_t epochs) {
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-3));
  constexpr int64_t kBatch = 64;
  const int64_t batches = digits.labels.size(0) / kBatch;
  const Progress progress(name, epochs * batches);
  net->train();
  for (int64_t step = 0; step < epochs * batches; ++step) {
    const auto rows = torch::randint(digits.labels.size(0), {kBatch}, torch::kLong);
    optimizer.zero_grad();
    const torch::Tensor loss =
        torch::cross_entropy_loss(net->forward(digits.images.index_select(0, rows)),
                                  digits.labels.index_select(0, rows) - first_label);
    loss.backward();
    optimizer.step();
    progress.show(step + 1, loss.item<double>());
  }
  net->eval();
}

struct Method {
  const char* name;
  const char* res_mode;
  int64_t pre_num;
  double lora_alpha;
};
constexpr Method kMethods[] = {{"lora", "none", 0, 8}, {"lora, 2 alpha", "none", 0, 16},
                               {"is", "is", 1, 8},     {"bs 1", "bs", 1, 8},
                               {"bs 3", "bs", 3, 8},   {"ms 1", "ms", 1, 8},
                               {"ms 3", "ms", 3, 8},   {"ms all", "ms", -1, 8}};

void work(const Options& options) {
  const Digits all = read_digits(options.text("data"), options.text("part"));
  const int64_t split = all.labels.size(0) * 8 / 9, epochs = options.number("epochs", 1);
  const Digits learn = all.rows(0, split), held_out = all.rows(split, all.labels.size(0));
  const auto made = [&] { return Net(options.number("width", 1), options.number("layers", 1)); };
  torch::manual_seed(0);
  Net net = made();
  train("digits 0-4", net, net->parameters(), learn.only(0, 4), 0, epochs);
  fmt::print("digits 0-4: accuracy {:.4f} on {} held-out images\n\n",
             accuracy(net, held_out.only(0, 4), 0), held_out.only(0, 4).labels.size(0));
  std::map<std::string, torch::Tensor> base;
  for (const auto& [name, tensor] : reslora::base_tensors(*net))
    base.emplace(name, tensor.detach().clone());

  const Digits second = learn.only(5, 9), judged = held_out.only(5, 9);
  fmt::print("digits 5-9, adapters of r = {} and the head, {} held-out images\n",
             options.number("r"), judged.labels.size(0));
  fmt::print("{:<14} {:>9} {:>9} {:>11}\n", "method", "accuracy", "merged", "parameters");
  for (const Method& method : kMethods) {
    Net adapted = made();
    reslora::load_base_tensors(*adapted, base);
    torch::manual_seed(1);
    auto adapters = reslora::inject(*adapted, reslora::ResLoraConfig()
                                                  .r(options.number("r"))
                                                  .lora_alpha(method.lora_alpha)
                                                  .res_mode(method.res_mode)
                                                  .pre_num(method.pre_num)
                                                  .target_modules(R"(layers\.\d+)")
                                                  .modules_to_save({"head"}));
    train(method.name, adapted, adapters.parameters(), second, 5, epochs);
    const double before = accuracy(adapted, judged, 5);
    const torch::NoGradGuard no_grad;
    adapters.calibrate(second.images.split(512),
                       [&](const torch::Tensor& images) { return adapted->forward(images); });
    adapters.merge();
    int64_t count = 0;
    for (const torch::Tensor& parameter : adapters.parameters()) count += parameter.numel();
    fmt::print("{:<14} {:9.4f} {:9.4f} {:11}\n", method.name, before, accuracy(adapted, judged, 5),
               count);
  }
  fmt::print(
      "\none seed and one learning rate: this shows that the parts work, not which method is "
      "better\n");
}

}  // namespace

int main(int count, char** arguments) {
  return run_program("mnist", [&] {
    work(Options(count, arguments,
                 {{"data", "../shared/data/mnist"},
                  {"part", "t10k"},
                  {"epochs", "12"},
                  {"r", "4"},
                  {"layers", "8"},
                  {"width", "128"}}));
  });
}
