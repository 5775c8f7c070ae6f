// Adapts generated models and prints which layers were found: for comparison with Python.
//
//   reslora_trees FOLDER < cases
//
// A case is lines `module KIND PATH` in the order of registration, parents first, then
// `config JSON` in one line. Kinds: Linear, Embedding, ModuleList, Sequential, and Kind0 to Kind3,
// classes of their own that hold modules. Printed are lines `chain`, `saved` and `warning`, or one
// `refused`; then `end`. The adapter of the n-th case, every number of its heads 0.25, is saved to
// FOLDER/n.
#include <reslora/adapters.h>
#include <reslora/config_json.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/utils.h>

#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#include "testing.h"

namespace reslora {
namespace {

using torch::nn::Module;

/// Holds modules; its forward lets it stand in a Sequential.
struct Kind : Module {
  at::Tensor forward(at::Tensor x) { return x; }
};
struct Kind0 : Kind {};
struct Kind1 : Kind {};
struct Kind2 : Kind {};
struct Kind3 : Kind {};

struct Tree {
  std::shared_ptr<Module> model = std::make_shared<Kind0>();
  std::map<std::string, std::shared_ptr<Module>> modules = {{"", model}};

  template <typename T>
  void add(const std::string& path, std::shared_ptr<T> module) {
    const size_t dot = path.rfind('.');
    const std::string name = path.substr(dot + 1);
    const auto& parent = modules.at(dot == std::string::npos ? "" : path.substr(0, dot));
    if (auto list = std::dynamic_pointer_cast<torch::nn::ModuleListImpl>(parent)) {
      list->push_back(module);
    } else if (auto row = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(parent)) {
      if constexpr (!std::is_same_v<T, torch::nn::ModuleListImpl> &&
                    !std::is_same_v<T, torch::nn::SequentialImpl>)
        row->push_back(module);
    } else {
      parent->register_module(name, module);
    }
    modules[path] = module;
  }

  void add(const std::string& path, const std::string& kind) {
    if (kind == "Linear") return add(path, ResLoraLinear(4, 4).ptr());
    if (kind == "Embedding") return add(path, torch::nn::Embedding(4, 4).ptr());
    if (kind == "ModuleList") return add(path, torch::nn::ModuleList().ptr());
    if (kind == "Sequential") return add(path, torch::nn::Sequential().ptr());
    if (kind == "Kind0") return add(path, std::make_shared<Kind0>());
    if (kind == "Kind1") return add(path, std::make_shared<Kind1>());
    if (kind == "Kind2") return add(path, std::make_shared<Kind2>());
    return add(path, std::make_shared<Kind3>());
  }
};

void show(const Adapters& adapters) {
  for (size_t i = 0; i < adapters.chains().size(); ++i) {
    const Chain& chain = adapters.chains()[i].chain();
    for (int64_t n = 0; n < chain.size(); ++n)
      std::cout << "chain " << adapters.names()[i] << ' ' << chain.layer(n).name << ' '
                << chain.layer(n).r << ' ' << chain.layer(n).scaling << '\n';
  }
}

void adapt(const Tree& tree, const std::string& config, const std::string& folder) {
  const testing::Warnings warnings;
  try {
    torch::manual_seed(0);
    const Adapters adapters = inject(*tree.model, config_from_json(config));
    show(adapters);
    for (auto& item : tree.model->named_parameters())
      if (item.value().requires_grad() && item.key().find("reslora_") == std::string::npos)
        std::cout << "saved " << item.key() << '\n';
    const torch::NoGradGuard no_grad;
    for (auto& item : tree.model->named_parameters())
      if (item.key().find("reslora_") == std::string::npos) item.value().fill_(0.25);
    adapters.save(folder);
    for (const std::string& text : warnings.all) std::cout << "warning " << text << '\n';
  } catch (const c10::Error& error) {
    std::cout << "refused " << error.what_without_backtrace() << '\n';
  }
  std::cout << "end" << std::endl;
}

}  // namespace
}  // namespace reslora

int main(int, char** arguments) {
  const std::string folder = arguments[1];
  int number = 0;
  std::string word;
  auto tree = std::make_unique<reslora::Tree>();
  while (std::cin >> word) {
    std::string kind;
    std::string rest;
    if (word == "module") {
      std::cin >> kind >> rest;
      tree->add(rest, kind);
    } else {
      std::getline(std::cin >> std::ws, rest);
      reslora::adapt(*tree, rest, folder + "/" + std::to_string(number++));
      tree = std::make_unique<reslora::Tree>();
    }
  }
}
