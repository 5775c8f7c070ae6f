// Training that can be stopped and resumed to the same bits.
#pragma once

#include <reslora/adapters.h>
#include <torch/torch.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "../common/program.h"

/// Everything that a step depends on or leaves behind: parameters, optimizer, generator, number of
/// the step, and of adapters what merging needs.
class Checkpoint {
 public:
  Checkpoint(std::string path, int64_t every, const reslora::Adapters* adapters = nullptr)
      : path_(std::move(path)), every_(every), adapters_(adapters) {}

  /// Restores what was saved and returns the step to go on with; 0 where there is nothing.
  int64_t restore(std::vector<torch::Tensor>& parameters,
                  torch::optim::Optimizer& optimizer) const {
    if (!std::filesystem::exists(path_)) return 0;
    torch::serialize::InputArchive archive, state;
    torch::Tensor step, generator;
    std::vector<torch::Tensor> values;
    try {
      archive.load_from(path_);
      archive.read("step", step);
      archive.read("generator", generator);
      archive.read("optimizer", state);
      for (size_t k = 0;; ++k) {
        torch::Tensor value;  // a new one each time: a defined one is written to
        if (!archive.try_read("parameter" + std::to_string(k), value)) break;
        values.push_back(value);
      }
    } catch (const c10::Error&) {
      TORCH_CHECK(false, path_, " cannot be read: it is damaged; remove it, or take another --out");
    }
    bool fits = values.size() == parameters.size();
    for (size_t k = 0; fits && k < values.size(); ++k)
      fits = values[k].sizes() == parameters[k].sizes();
    TORCH_CHECK_VALUE(fits, path_,
                      " must be of this model; got one of other sizes: take another --out");
    optimizer.load(state);
    const torch::NoGradGuard no_grad;
    for (size_t k = 0; k < values.size(); ++k) parameters[k].copy_(values[k]);
    for_each_window([&](const std::string& name, const reslora::LinkedChain& chain, int64_t n) {
      torch::Tensor norms, count, products;
      archive.try_read(name + ".products", products);
      if (archive.try_read(name + ".norms", norms) && archive.try_read(name + ".count", count))
        chain.set_norms(n, {norms, count, products});
    });
    at::Generator(at::detail::getDefaultCPUGenerator()).set_state(generator);
    return step.item<int64_t>();
  }

  /// Saves after every so many steps, and after the last.
  void save_if_due(int64_t step, bool is_last, const std::vector<torch::Tensor>& parameters,
                   const torch::optim::Optimizer& optimizer) const {
    if (!is_last && (every_ == 0 || step % every_ != 0)) return;
    torch::serialize::OutputArchive archive, state;
    optimizer.save(state);
    archive.write("step", torch::tensor(step));
    archive.write("generator", at::detail::getDefaultCPUGenerator().get_state());
    archive.write("optimizer", state);
    for (size_t k = 0; k < parameters.size(); ++k)
      archive.write("parameter" + std::to_string(k), parameters[k].detach());
    for_each_window([&](const std::string& name, const reslora::LinkedChain& chain, int64_t n) {
      const reslora::NormWindow window = chain.view().layers[n].norms;
      if (!window.is_defined()) return;
      archive.write(name + ".norms", window.norms());
      if (window.products().defined()) archive.write(name + ".products", window.products());
      archive.write(name + ".count", window.count());
    });
    archive.save_to(path_ + ".unfinished");
    std::filesystem::rename(path_ + ".unfinished", path_);
  }

 private:
  template <typename Visit>
  void for_each_window(const Visit& visit) const {
    if (adapters_ == nullptr) return;
    int64_t index = 0;
    for (const reslora::LinkedChain& chain : adapters_->chains())
      for (int64_t n = 0; n < chain.chain().size(); ++n)
        visit("window" + std::to_string(index++), chain, n);
  }

  std::string path_;
  int64_t every_;
  const reslora::Adapters* adapters_;
};

struct Run {
  std::string name;
  int64_t steps;
  double learning_rate;
  int64_t stop_after;  // 0: never; else the program ends there, to be resumed
};

/// Minimises loss(); returns the seconds of the steps done now.
inline double train(const Run& run, std::vector<torch::Tensor> parameters,
                    const Checkpoint& checkpoint, const std::function<torch::Tensor()>& loss) {
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(run.learning_rate));
  const Progress progress(run.name, run.steps);
  const auto start = std::chrono::steady_clock::now();
  for (int64_t step = checkpoint.restore(parameters, optimizer); step < run.steps;) {
    optimizer.zero_grad();
    const torch::Tensor value = loss();
    value.backward();
    optimizer.step();
    ++step;
    progress.show(step, value.item<double>());
    checkpoint.save_if_due(step, step == run.steps, parameters, optimizer);
    TORCH_CHECK(run.stop_after == 0 || step < run.stop_after || step == run.steps,
                "stopped after step ", step, " of ", run.name, ", as asked; run again to go on");
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
