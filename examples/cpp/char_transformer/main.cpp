// A character transformer in LibTorch: pretrained on one text, adapted to another with plain LoRA
// and each shortcut, merged, exported. Prints a table; no Python anywhere.
//
//   char_transformer --data FOLDER --out FOLDER     # FOLDER/tinyshakespeare, FOLDER/sst2
//   char_transformer --text FILE --other FILE --out FOLDER --steps 600 --adapt-steps 300
//
// --out gets pretrained.pt, checkpoints (the program resumes from them bit by bit) and, for each
// method, adapter/ (C++ and Python) and lora/ (PEFT).
#include <reslora/reslora.h>

#include "model.h"
#include "text.h"
#include "training.h"

namespace {

constexpr int64_t kWindow = 65, kBatch = 16;

struct Method {
  const char* name;
  const char* res_mode;
  int64_t pre_num;
  double lora_alpha;
};
// Part of what `is` and `ms` gain is their larger scale: plain LoRA with doubled alpha stands by.
constexpr Method kMethods[] = {{"lora", "none", 0, 16}, {"lora, 2 alpha", "none", 0, 32},
                               {"is", "is", 1, 16},     {"bs 2", "bs", 2, 16},
                               {"ms 2", "ms", 2, 16},   {"ms all", "ms", -1, 16}};

double held_out_loss(Decoder& model, const Text& text) {
  const torch::NoGradGuard no_grad;
  model->eval();
  double total = 0;
  const auto batches = Text::in_order(text.held_out, 128, kWindow).split(32);
  for (const torch::Tensor& batch : batches) total += model->loss(batch).item<double>();
  model->train();
  return total / static_cast<double>(batches.size());
}

std::string file_name(std::string name) {
  for (char& c : name)
    if (c == ' ' || c == ',') c = '_';
  return name;
}

void adapt(const Method& method, const Options& options, const Text& text,
           const std::map<std::string, torch::Tensor>& base, Decoder& model) {
  const std::string folder = options.text("out") + "/" + file_name(method.name);
  std::filesystem::create_directories(folder);
  reslora::load_base_tensors(*model, base);
  torch::manual_seed(1);
  auto adapters = reslora::inject(*model, reslora::ResLoraConfig()
                                              .r(8)
                                              .lora_alpha(method.lora_alpha)
                                              .res_mode(method.res_mode)
                                              .pre_num(method.pre_num)
                                              .target_modules(R"(layers\..*_proj)"));
  const Checkpoint checkpoint(folder + "/checkpoint.pt", options.number("checkpoint-every"),
                              &adapters);
  const Run run = {method.name, options.number("adapt-steps"), 2e-3, options.number("stop-after")};
  const double seconds = train(run, adapters.parameters(), checkpoint, [&] {
    return model->loss(Text::sample(text.train, kBatch, kWindow));
  });
  const double adapted = held_out_loss(model, text);
  adapters.save(folder + "/adapter", /*statistics=*/true);

  model->eval();
  const torch::NoGradGuard no_grad;
  const auto windows = Text::in_order(text.train, 512, kWindow).split(64);
  const torch::Tensor x = Text::in_order(text.held_out, 32, kWindow), wanted = model->forward(x);
  adapters.calibrate(windows, [&](const torch::Tensor& ids) { return model->forward(ids); });
  adapters.export_lora(folder + "/lora");
  adapters.merge();
  const double off = ((model->forward(x) - wanted).norm() / wanted.norm()).item<double>();
  fmt::print("{:<14} {:8.4f} {:8.4f} {:10.1e} {:8.1f}\n", method.name, adapted,
             held_out_loss(model, text), off, seconds);
}

void work(const Options& options) {
  const std::string data = options.text("data"), out = options.text("out");
  const auto path = [&](const char* name, const char* usual) {
    return options.text(name).empty() ? data + usual : options.text(name);
  };
  const Text first(path("text", "/tinyshakespeare/input.txt"), kWindow);
  const Text second(path("other", "/sst2/stsa.binary.train"), kWindow);
  std::filesystem::create_directories(out);
  const auto made = [&] {
    torch::manual_seed(0);
    return Decoder(options.number("width", 1), options.number("layers", 1), kWindow);
  };
  Decoder model = made();
  const Checkpoint checkpoint(out + "/pretrained.pt", options.number("checkpoint-every"));
  const Run run = {"pretraining", options.number("steps"), 2e-3, options.number("stop-after")};
  const double seconds = train(run, model->parameters(), checkpoint, [&] {
    return model->loss(Text::sample(first.train, kBatch, kWindow));
  });
  std::map<std::string, torch::Tensor> base;
  for (const auto& [name, tensor] : reslora::base_tensors(*model))
    base.emplace(name, tensor.detach().clone());
  fmt::print("pretrained in {:.1f} s: held-out loss {:.4f} on its text, {:.4f} on the other\n\n",
             seconds, held_out_loss(model, first), held_out_loss(model, second));
  fmt::print("{:<14} {:>8} {:>8} {:>10} {:>8}\n", "method", "adapted", "merged", "output off",
             "seconds");
  for (const Method& method : kMethods) {
    Decoder fresh = made();
    adapt(method, options, second, base, fresh);
  }
  fmt::print(
      "\none seed and one learning rate: this shows that the parts work, not which method is "
      "better\n");
}

}  // namespace

int main(int count, char** arguments) {
  return run_program("char_transformer", [&] {
    work(Options(count, arguments,
                 {{"data", "../shared/data"},
                  {"text", ""},
                  {"other", ""},
                  {"out", "char_out"},
                  {"steps", "600"},
                  {"adapt-steps", "300"},
                  {"layers", "6"},
                  {"width", "128"},
                  {"checkpoint-every", "50"},
                  {"stop-after", "0"}}));
  });
}
