// What the public calls of layers, chains and the handle of an adapted model refuse.
#include "refusals.h"

#include <reslora/adapters.h>
#include <torch/torch.h>

#include <fstream>
#include <sstream>

#include "nn/small_net.h"

namespace reslora {
namespace {

using testing::config_of;
using testing::kWidth;
using testing::Net;
using testing::refuse_nothing;
using testing::refuses_call;
using testing::refuses_positions;
using testing::refuses_tensors;
using testing::Wrong;

const std::set<Wrong> kRows = {Wrong::kDims};

std::vector<ResLoraLinear> two_layers() {
  return {ResLoraLinear(kWidth, kWidth), ResLoraLinear(kWidth, kWidth)};
}

TEST(NnRefusals, Layers) {
  const std::vector<ResLoraLinear> layers = two_layers();
  ResLoraLinear first = layers[0], second = layers[1];
  const at::Tensor x = torch::randn({3, kWidth});
  refuses_call(
      "ResLoraLinearImpl::name", "a plain layer", [&] { first->name(); }, "got a plain one");
  refuses_call(
      "ResLoraLinearImpl::forward_with_taps", "a plain layer",
      [&] { first->forward_with_taps(x, {}); }, "needs a layer that");
  const LinkedChain chain = link(layers, config_of());
  refuses_tensors(
      "ResLoraLinearImpl::forward", "x", x, [&](const at::Tensor& x) { first->forward(x); }, kRows);
  refuses_tensors(
      "ResLoraLinearImpl::forward_with_taps", "x", x,
      [&](const at::Tensor& x) { first->forward_with_taps(x, {}); }, kRows);
  // A tap of other rows is one of another forward: the layer runs without it, and counts that.
  refuses_tensors("ResLoraLinearImpl::forward_with_taps", "taps", torch::randn({3, 2}),
                  [&](const at::Tensor& tap) {
                    second->forward_with_taps(x, {{tap, {}}});
                  },
                  {Wrong::kUndefined, Wrong::kEmpty, Wrong::kDims});
  const at::Tensor nested = at::_nested_tensor_from_tensor_list({x, x});
  refuses_call(
      "ResLoraLinearImpl::forward", "nested x", [&] { first->forward(nested); },
      "x must be a dense tensor; got a nested tensor (layer 0)");
  refuses_call(
      "forward_together", "nested x", [&] { forward_together({first.ptr()}, nested); },
      "got a nested tensor (layer 0)");
  refuses_call(
      "ResLoraLinearImpl::forward_with_taps", "another chain's taps",
      [&] { first->forward_with_taps(x, {std::vector<at::Tensor>(3)}); }, "got 3");
  refuses_tensors(
      "forward_together", "x", x, [&](const at::Tensor& x) { forward_together({first.ptr()}, x); },
      kRows);
  refuses_call(
      "forward_together", "null", [&] { forward_together({nullptr}, x); }, "null pointer");
  refuses_call(
      "forward_together", "one chain",
      [&] {
        forward_together({first.ptr(), second.ptr()}, x);
      },
      "different chains");
  refuses_call(
      "ResLoraLinearImpl::ResLoraLinearImpl", "in_features", [] { ResLoraLinear(-1, 4); },
      "must not be negative");
  refuse_nothing({"ResLoraLinearImpl::reset", "ResLoraLinearImpl::reset_parameters",
                  "ResLoraLinearImpl::pretty_print", "ResLoraLinearImpl::clone",
                  "ResLoraLinearImpl::save", "ResLoraLinearImpl::is_adapted",
                  "ResLoraLinearImpl::is_merged", "ResLoraLinearImpl::is_linked"});
}

TEST(NnRefusals, Chains) {
  const std::vector<ResLoraLinear> layers = two_layers();
  refuses_call(
      "link", "no layers", [] { link({}, config_of()); }, "got none");
  refuses_call(
      "link", "an empty holder",
      [&] {
        link({layers[0], ResLoraLinear(nullptr)}, config_of());
      },
      "holder at 1");
  refuses_call(
      "link", "names", [&] { link(layers, config_of(), {"a"}); }, "got 1 names for 2");
  refuses_call(
      "link", "one name for two",
      [&] {
        link(layers, config_of(), {"a", "a"});
      },
      "[a, a]");
  refuses_call(
      "link", "one layer twice",
      [&] {
        link({layers[0], layers[0]}, config_of());
      },
      "same");
  EXPECT_FALSE(layers[0]->is_adapted());
  const LinkedChain chain = link(layers, config_of());
  refuses_call(
      "link", "a linked layer", [&] { link(layers, config_of(), {}); }, "linked already");
  FitCollector other({chain.view()});
  chain.collect(&other, 7);
  refuses_call(
      "LinkedChain::collect", "index",
      [&] {
        ResLoraLinear(layers[0])->forward(torch::randn({3, kWidth}));
      },
      "got 7 of 1");
  refuses_call(
      "relink", "a model itself", [&] { relink(*ResLoraLinear(layers[0])); }, "linked already");
  refuse_nothing({"LinkedChain::LinkedChain", "LinkedChain::chain", "LinkedChain::begin_forward",
                  "LinkedChain::parameters", "LinkedChain::view", "LinkedChain::set_enabled",
                  "LinkedChain::is_enabled", "LinkedChain::mark_merged"});
}

TEST(NnRefusals, Positions) {
  const std::vector<ResLoraLinear> layers = two_layers();
  const LinkedChain chain = link(layers, config_of());
  refuses_positions("LinkedChain::set_norms", "position", 2,
                    [&](int64_t n) { chain.set_norms(n, NormWindow(3, at::kCPU)); });
  refuses_call(
      "LinkedChain::set_norms", "meta", [&] { chain.set_norms(0, NormWindow(3, at::kMeta)); },
      "must hold values");
  refuses_positions("LinkedChain::leave_out", "position", 2,
                    [&](int64_t n) { chain.leave_out(n, {}); });
  refuses_call(
      "LinkedChain::leave_out", "others", [&] { chain.leave_out(1, {1}); },
      "must name positions before");
  refuses_positions("LinkedChain::is_training", "position", 2,
                    [&](int64_t n) { chain.is_training(n); });
  refuses_positions("LinkedChain::missed_links", "position", 2,
                    [&](int64_t n) { chain.missed_links(n); });
}

TEST(NnRefusals, Archives) {
  const auto archived = [](int64_t in, int64_t r) {
    const std::vector<ResLoraLinear> layers = {ResLoraLinear(in, kWidth)};
    link(layers, config_of().r(r));
    std::stringstream stream;
    torch::save(layers[0], stream);
    return stream.str();
  };
  const auto load = [](const std::string& bytes) {
    return [bytes] {
      const std::vector<ResLoraLinear> layers = {ResLoraLinear(kWidth, kWidth)};
      const LinkedChain chain = link(layers, config_of().r(2));
      const at::Tensor A = layers[0]->reslora_A.clone(), weight = layers[0]->weight.clone();
      std::stringstream stream(bytes);
      ResLoraLinear layer = layers[0];
      try {
        torch::load(layer, stream);
      } catch (...) {
        EXPECT_TRUE(torch::equal(A, layer->reslora_A) && torch::equal(weight, layer->weight));
        throw;
      }
    };
  };
  EXPECT_NO_THROW(load(archived(kWidth, 2))());
  refuses_call("ResLoraLinearImpl::load", "another rank", load(archived(kWidth, 3)),
               "got Float [3, 8] for reslora_A, which is Float [2, 8]");
  refuses_call("ResLoraLinearImpl::load", "other features", load(archived(5, 2)), "for weight");
}

TEST(NnRefusals, Models) {
  Net plain, net;
  refuses_call(
      "inject", "options", [&] { inject(*plain, config_of().r(0)); }, "r must be");
  refuses_call(
      "inject", "names", [&] { inject(*plain, config_of().target_modules({"k"})); }, "'k'");
  const Adapters adapters = inject(*net, config_of());
  refuses_call(
      "inject", "an adapted model", [&] { inject(*net, config_of()); }, "must be plain");
  const std::string folder = testing::new_folder();
  adapters.save(folder);
  std::ofstream(folder + "/adapter_config.json") << "{}";
  refuses_call(
      "load", "a damaged folder", [&] { load(*plain, folder); }, "");
  refuses_call(
      "Adapters::load", "a damaged folder", [&] { adapters.load(folder); }, "");
  refuses_call(
      "Adapters::of_clone", "the model itself", [&] { adapters.of_clone(*net); }, "clone");
  const auto whole = base_tensors(*plain);
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : whole) tensors[name] = tensor.detach() + 1;
  refuses_tensors("load_base_tensors", "tensors", tensors.at("layers.3.q_proj.weight"),
                  [&](const at::Tensor& tensor) {
                    auto own = tensors;
                    own["layers.3.q_proj.weight"] = tensor;
                    load_base_tensors(*plain, own);
                  },
                  {Wrong::kDtype});
  refuses_call(
      "load_base_tensors", "too few", [&] { load_base_tensors(*plain, {}); }, "missing");
  tensors["more"] = at::ones({1});
  refuses_call(
      "load_base_tensors", "one more", [&] { load_base_tensors(*plain, tensors); }, "more");
  refuse_nothing({"base_tensors"});
}

TEST(NnRefusals, Handles) {
  Net net;
  const Adapters adapters = inject(*net, config_of());
  const std::vector<at::Tensor> batches = {torch::randn({3, kWidth})};
  const auto run = [&](const at::Tensor& x) { return net->forward(x); };
  refuses_call(
      "Adapters::calibrate", "training mode", [&] { adapters.calibrate(batches, run); },
      "must be in eval mode");
  net->eval();
  refuses_call(
      "Adapters::calibrate", "a mask",
      [&] { adapters.calibrate(batches, run, [](auto&) {
              return torch::full({1, 3}, 2);
            }); },
      "must hold 1");
  refuses_call(
      "Adapters::calibrate", "ridge", [&] { adapters.calibrate(batches, run, {NAN}); }, "ridge");
  refuses_call(
      "Adapters::plan", "method", [&] { adapters.plan("best"); }, "'best'");
  refuses_call(
      "Adapters::merge", "method", [&] { adapters.merge("best"); }, "'best'");
  refuses_call(
      "Adapters::unmerge", "not merged", [&] { adapters.unmerge(); }, "that is not");
  refuses_call(
      "Adapters::export_lora", "rank",
      [&] { adapters.export_lora(testing::new_folder(), ExportOptions().rank(-1)); }, "rank");
  adapters.merge();
  refuses_call(
      "Adapters::merge", "merged", [&] { adapters.merge(); }, "unmerge");
  refuses_call(
      "Adapters::plan", "merged", [&] { adapters.plan(); }, "unmerge");
  refuses_call(
      "Adapters::set_enabled", "merged", [&] { adapters.set_enabled(true); }, "unmerge");
  refuse_nothing({"Adapters::Adapters", "Adapters::config", "Adapters::chains", "Adapters::names",
                  "Adapters::parameters", "Adapters::begin_forward", "Adapters::links",
                  "Adapters::print_links", "Adapters::views", "Adapters::is_merged",
                  "Adapters::save"});
}

}  // namespace
}  // namespace reslora
