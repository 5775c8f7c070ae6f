// Clones of adapted models: whose adapters they get, and what is refused before anything is linked.
#include <gtest/gtest.h>
#include <reslora/adapters.h>
#include <torch/torch.h>

#include "small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

std::shared_ptr<NetImpl> clone_of(const Net& net) {
  return std::dynamic_pointer_cast<NetImpl>(net->clone());
}

/// An adapted model with a head that trains, fits, and a clone of it.
struct Cloned {
  explicit Cloned(const ResLoraConfig& config, int64_t layers = 4)
      : net(layers), adapters(inject(*net, ResLoraConfig(config).modules_to_save({"head"}))) {
    randomise(adapters);
    net->eval();
    adapters.calibrate(std::vector{x},
                       [&](const at::Tensor& batch) { return net->forward(batch); });
    copy = clone_of(net);
  }

  at::Tensor output() { return net->forward(x).detach(); }

  at::Tensor x = torch::randn({30, kWidth});
  Net net;
  Adapters adapters;
  std::shared_ptr<NetImpl> copy;
};

/// True where no layer of a clone was linked and what trains is as LibTorch leaves it.
bool is_untouched(const torch::nn::Module& clone) {
  for (const auto& module : clone.modules(/*include_self=*/false)) {
    const auto* layer = module->as<ResLoraLinearImpl>();
    if (layer != nullptr && (layer->is_linked() || layer->weight.requires_grad())) return false;
    const auto* norm = module->as<torch::nn::LayerNormImpl>();
    if (norm != nullptr && !norm->weight.requires_grad()) return false;
  }
  return true;
}

TEST(OfClone, AnotherModelIsRefusedAndLeftAsItWas) {
  Cloned four(config_of("is")), three(config_of("is"), 3);
  Cloned stronger(config_of("is").lora_alpha(40)), other_mode(config_of("ms"));
  for (Cloned* other : {&three, &stronger, &other_mode}) {
    EXPECT_TRUE(refuses([&] { four.adapters.of_clone(*other->copy); },
                        "must be a clone of the one that these adapters are of; got none of its "
                        "layers of chain layers.*.q_proj"));
    EXPECT_TRUE(is_untouched(*other->copy));
    const Adapters own = other->adapters.of_clone(*other->copy);
    EXPECT_EQ(own.config().lora_alpha(), other->adapters.config().lora_alpha());
    EXPECT_TRUE(torch::equal(other->copy->forward(other->x), other->output()));
  }
}

TEST(OfClone, APartAndAModelOfMoreAreRefusedAndLeftAsTheyWere) {
  Cloned cloned(config_of("is"));
  EXPECT_TRUE(refuses([&] { cloned.adapters.of_clone(*cloned.copy->layers[0]); },
                      "[of_clone] the model must hold every layer of a chain; got none for "
                      "layers.1.q_proj"));
  struct Two : torch::nn::Module {
  } two;
  two.register_module("net", cloned.copy);
  EXPECT_TRUE(refuses([&] { cloned.adapters.of_clone(two); },
                      "modules_to_save of the model; got "
                      "no head.bias [3]"));
  Cloned other(config_of("bs"));
  two.register_module("other", other.copy);
  EXPECT_TRUE(refuses([&] { cloned.adapters.of_clone(two); },
                      "got layers.0.q_proj, which is adapted but not by them"));
  EXPECT_TRUE(is_untouched(two));
  cloned.adapters.of_clone(*cloned.copy);
  EXPECT_TRUE(torch::equal(cloned.copy->forward(cloned.x), cloned.output()));
}

TEST(OfClone, MergesByTheFitsOfTheModel) {
  Cloned cloned(config_of("is"));
  const Adapters own = cloned.adapters.of_clone(*cloned.copy);
  own.merge();
  cloned.adapters.merge();
  EXPECT_TRUE(torch::equal(cloned.copy->forward(cloned.x), cloned.output()));
  cloned.adapters.unmerge();
}

TEST(OfClone, AdaptersThatAMergeSwitchedOffAreOnInAnEarlierClone) {
  Cloned cloned(config_of("is"));
  const at::Tensor wanted = cloned.output();
  cloned.adapters.merge();
  const Adapters own = cloned.adapters.of_clone(*cloned.copy);
  EXPECT_TRUE(torch::equal(cloned.copy->forward(cloned.x), wanted));
  own.merge();
  EXPECT_TRUE(torch::equal(cloned.copy->forward(cloned.x), cloned.output()));
}

/// The first block runs again at the end.
struct TwiceImpl : torch::nn::Cloneable<TwiceImpl> {
  TwiceImpl() { reset(); }
  void reset() override {
    layers = register_module("layers", torch::nn::ModuleList());
    for (int n = 0; n < 2; ++n) layers->push_back(Block());
    layers->push_back(layers[0]);
  }
  torch::nn::ModuleList layers{nullptr};
};

TEST(OfClone, ABlockThatStandsTwiceIsRefusedSinceLibTorchClonesItTwice) {
  TwiceImpl model;
  const Adapters adapters = inject(model, config_of("is"));
  const auto copy = model.clone();
  for (const char* op : {"of_clone", "relink"}) {
    EXPECT_TRUE(refuses(
        [&] {
          if (op == std::string("relink")) {
            relink(*copy);
          } else {
            adapters.of_clone(*copy);
          }
        },
        "[" + std::string(op) +
            "] a clone must hold every layer once; got two copies of "
            "layers.0.q_proj"));
    EXPECT_TRUE(is_untouched(*copy));
  }
}

/// A head of two names, beside adapted layers.
struct TwoNamesImpl : torch::nn::Cloneable<TwoNamesImpl> {
  TwoNamesImpl() { reset(); }
  void reset() override {
    q_proj = register_module("q_proj", ResLoraLinear(kWidth, kWidth));
    heads = register_module("heads", torch::nn::ModuleList(torch::nn::Linear(kWidth, 3)));
    heads->push_back(heads[0]);
  }
  ResLoraLinear q_proj{nullptr};
  torch::nn::ModuleList heads{nullptr};
};

TEST(OfClone, AHeadThatStandsTwiceIsRefusedSinceItsCopiesWouldTrainApart) {
  TwoNamesImpl model;
  const Adapters adapters =
      inject(model, ResLoraConfig().target_modules({"q_proj"}).modules_to_save({"heads"}));
  EXPECT_EQ(adapters.parameters().size(), 4U);
  const auto copy = model.clone();
  EXPECT_TRUE(refuses([&] { adapters.of_clone(*copy); },
                      "[of_clone] a clone must hold every tensor once; got two copies of "
                      "heads.1.bias"));
  EXPECT_TRUE(is_untouched(*copy));
}

TEST(Relink, AMergeAfterTheCloneWasMadeSwitchesNothingOffInIt) {
  Cloned cloned(config_of("is"));
  const at::Tensor wanted = cloned.output();
  cloned.adapters.merge();
  relink(*cloned.copy);
  EXPECT_TRUE(torch::equal(cloned.copy->forward(cloned.x), wanted));
}

TEST(Relink, ACloneOfAMergedModelStaysMergedOnce) {
  Cloned cloned(config_of("is"));
  cloned.adapters.merge();
  const at::Tensor wanted = cloned.output();
  const auto copy = clone_of(cloned.net);
  cloned.adapters.unmerge();
  relink(*copy);
  EXPECT_TRUE(torch::equal(copy->forward(cloned.x), wanted));
}

TEST(Relink, ACloneOutlivesTheModelThatWasMergedLater) {
  at::Tensor x, wanted;
  std::shared_ptr<NetImpl> copy;
  {
    Cloned cloned(config_of("is"));
    x = cloned.x;
    wanted = cloned.output();
    copy = cloned.copy;
    cloned.adapters.merge();
  }
  relink(*copy);
  EXPECT_TRUE(torch::equal(copy->forward(x), wanted));
}

TEST(Relink, LinksNothingWhereALaterChainLacksALayer) {
  Cloned cloned(config_of("is"));
  struct Part : torch::nn::Module {
  } part;
  for (int n = 0; n < 4; ++n) {
    const auto& block = *cloned.copy->layers[n]->as<BlockImpl>();
    part.register_module("q" + std::to_string(n), block.q_proj);
    if (n < 3) part.register_module("v" + std::to_string(n), block.v_proj);
  }
  EXPECT_TRUE(refuses([&] { relink(part); },
                      "[relink] the model must hold every layer of a chain; got none for "
                      "layers.3.v_proj"));
  EXPECT_TRUE(is_untouched(*cloned.copy));
}

}  // namespace
}  // namespace reslora
