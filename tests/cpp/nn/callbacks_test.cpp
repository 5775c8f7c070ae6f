// What a program may do from inside of a call that calls it back, and what training leaves behind:
// heads that two modules share, archives, modes of files.
#include <fcntl.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/merge.h>
#include <reslora/merge_files.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include <fstream>
#include <functional>
#include <sstream>
#include <stdexcept>

#include "nn/small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using testing::config_of;
using testing::kWidth;
using testing::Net;
using testing::randomise;
using testing::refuses;

TEST(Callbacks, AMergeInsideOfAMergeIsRefusedAndOneIsMade) {
  Net net;
  const Adapters adapters = inject(*net, config_of("none"));
  randomise(adapters);
  const at::Tensor before = net->layers[0]->as<testing::BlockImpl>()->q_proj->weight.clone();
  const auto wanted = adapters.plan().layers()[0];
  int64_t calls = 0;
  adapters.merge("", [&](int64_t) {
    ++calls;
    EXPECT_TRUE(refuses([&] { adapters.merge(); }, "a call from a callback of merge"));
    EXPECT_TRUE(refuses([&] { adapters.unmerge(); }, "a callback of merge"));
    EXPECT_TRUE(refuses([&] { adapters.set_enabled(false); }, "a callback of merge"));
  });
  EXPECT_EQ(calls, 8);
  const at::Tensor& merged = net->layers[0]->as<testing::BlockImpl>()->q_proj->weight;
  EXPECT_TRUE(testing::all_close(merged, before + wanted.B.matmul(wanted.A), 1e-6));
  adapters.unmerge();
  EXPECT_TRUE(torch::equal(merged, before));
}

TEST(Callbacks, AModelThatIsBeingMergedIsNotReadCopiedOrSaved) {
  Net net;
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  net->eval();
  const at::Tensor x = torch::randn({5, kWidth}), before = net->forward(x);
  adapters.merge("weight");
  const at::Tensor wanted = net->forward(x);
  adapters.unmerge();
  const auto copy = net->clone();
  const std::string folder = testing::new_folder() + "/lora";
  int64_t refused = 0;
  const auto expect = [&](const std::function<void()>& call) {
    const auto result = refuses(call, "from a callback of merge");
    EXPECT_TRUE(result);
    refused += result;
  };
  adapters.merge("weight", [&](int64_t) {
    expect([&] { adapters.plan(); });
    expect([&] { adapters.export_lora(folder); });
    expect([&] { adapters.of_clone(*copy); });
    expect([&] { net->clone(); });
    expect([&] { net->forward(x); });
    expect([&] {
      std::stringstream stream;
      torch::save(net, stream);
    });
  });
  EXPECT_EQ(refused, 6 * 8);
  EXPECT_FALSE(std::ifstream(folder + "/adapter_config.json").good());
  EXPECT_TRUE(torch::equal(wanted, net->forward(x))) << "nothing is left at work";
  adapters.unmerge();
  EXPECT_TRUE(torch::equal(before, net->forward(x)));
  adapters.of_clone(*copy);
}

TEST(Callbacks, AMergeThatFailedLeavesAModelThatRuns) {
  Net net;
  const Adapters adapters = inject(*net, config_of("none"));
  const at::Tensor x = torch::randn({5, kWidth}), before = net->forward(x);
  EXPECT_THROW(adapters.merge("", [&](int64_t) { net->forward(x); }), c10::ValueError);
  EXPECT_FALSE(adapters.is_merged());
  EXPECT_TRUE(torch::equal(before, net->forward(x)));
}

/// Makes every warning an error.
class Strict : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { throw std::runtime_error(warning.msg()); }
};

/// True where `call` is stopped by a warning that holds `part`.
::testing::AssertionResult is_warned(const std::function<void()>& call, const std::string& part) {
  Strict strict;
  const c10::WarningUtils::WarningHandlerGuard guard(&strict);
  try {
    call();
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find(part) != std::string::npos)
      return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << error.what();
  }
  return ::testing::AssertionFailure() << "no warning";
}

TEST(Callbacks, AWarningThatThrowsLeavesAModelPlainOrUnmerged) {
  Net net, one(1);
  EXPECT_TRUE(is_warned([&] { inject(*one, config_of("is")); }, "no two adapted layers"));
  for (const at::Tensor& parameter : one->parameters()) EXPECT_TRUE(parameter.requires_grad());
  EXPECT_FALSE(one->layers[0]->as<testing::BlockImpl>()->q_proj->is_adapted());
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  net->eval();
  const at::Tensor x = torch::randn({5, kWidth}), before = net->forward(x);
  EXPECT_TRUE(is_warned([&] { adapters.merge(); }, "the rule 'weight' is taken"));
  const auto calibrate = [&] {
    adapters.calibrate(std::vector{x},
                       [&](const at::Tensor& batch) { return net->forward(batch); });
  };
  EXPECT_TRUE(is_warned(calibrate, "rows"));
  EXPECT_EQ(adapters.plan("weight").layers()[1].rule, MergeRule::kWeight);
  EXPECT_FALSE(adapters.views()[0].layers[1].fit.A.defined()) << "fits of few rows";
  EXPECT_FALSE(adapters.is_merged());
  EXPECT_TRUE(torch::equal(before, net->forward(x)));
}

TEST(Callbacks, AMergeInsideOfACalibrationIsRefused) {
  Net net;
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  net->eval();
  const at::Tensor weight = net->layers[0]->as<testing::BlockImpl>()->q_proj->weight.clone();
  const std::vector<at::Tensor> batches = {torch::randn({20, kWidth})};
  const auto calibrate = [&] {
    adapters.calibrate(batches, [&](const at::Tensor& x) {
      adapters.merge();
      return net->forward(x);
    });
  };
  EXPECT_TRUE(refuses(calibrate, "a callback of calibrate"));
  EXPECT_FALSE(adapters.is_merged());
  EXPECT_TRUE(torch::equal(weight, net->layers[0]->as<testing::BlockImpl>()->q_proj->weight));
  adapters.merge();  // nothing is left at work
}

TEST(Callbacks, AnErrorOfTheProgramTakesTheMergeBack) {
  Net net;
  const Adapters adapters = inject(*net, config_of("none"));
  randomise(adapters);
  const auto before = net->layers[0]->as<testing::BlockImpl>()->q_proj->weight.clone();
  EXPECT_THROW(adapters.merge("", [](int64_t) { throw std::runtime_error("stop"); }),
               std::runtime_error);
  EXPECT_TRUE(torch::equal(before, net->layers[0]->as<testing::BlockImpl>()->q_proj->weight));
  EXPECT_FALSE(adapters.is_merged());
  adapters.merge();
}

TEST(Callbacks, APlanIsNotRevertedByItsOwnProgress) {
  const Chain chain(ResLoraConfig().res_mode("none"), {{"a", 4, 4, 2, 1}});
  LayerView layer{torch::randn({4, 4}), torch::randn({2, 4}), torch::randn({4, 2}), {}};
  const at::Tensor before = layer.weight.clone();
  MergePlan plan({{chain, {layer}}}, "");
  plan.apply(true, false, [&](int64_t) {
    EXPECT_TRUE(refuses([&] { plan.revert(); }, "a call from its progress"));
  });
  EXPECT_TRUE(plan.is_applied());
  EXPECT_FALSE(torch::equal(before, layer.weight));
  plan.revert();
  EXPECT_TRUE(torch::equal(before, layer.weight));
}

/// One linear layer that stands at two places.
struct HeadsImpl : torch::nn::Module {
  HeadsImpl() {
    own = register_module("own", torch::nn::Linear(kWidth, 3));
    register_module("other", own);
  }
  torch::nn::Linear own{nullptr};
};
TORCH_MODULE(Heads);

struct WithHeadsImpl : torch::nn::Module {
  WithHeadsImpl() {
    q_proj = register_module("q_proj", ResLoraLinear(kWidth, kWidth));
    heads = register_module("heads", Heads());
  }
  ResLoraLinear q_proj{nullptr};
  Heads heads{nullptr};
};
TORCH_MODULE(WithHeads);

TEST(SharedHeads, MoveOnce) {
  WithHeads net;
  const Adapters adapters =
      inject(*net, ResLoraConfig().target_modules({"q_proj"}).modules_to_save({"heads"}));
  const at::Tensor before = net->heads->own->bias.detach().clone();
  torch::optim::SGD optimizer(adapters.parameters(), torch::optim::SGDOptions(0.5));
  net->heads->own->forward(torch::zeros({1, kWidth})).sum().backward();
  optimizer.step();
  EXPECT_TRUE(testing::all_close(net->heads->own->bias, before - 0.5, 1e-6));
  EXPECT_EQ(adapters.parameters().size(), 4U);  // A, B, and the head's weight and bias
}

/// Two forwards whose inputs differ in size, so that alpha* depends on which are remembered.
void train_some(Net& net, int first, int last) {
  for (int k = first; k < last; ++k) {
    torch::manual_seed(k);
    net->forward(torch::randn({4, kWidth}) * (1 + k));
  }
}

TEST(Archives, OfATrainingThatGoesOnKeepTheNorms) {
  const ResLoraConfig config = config_of("is").norm_window(5);
  Net whole, before, after;
  const Adapters of_whole = inject(*whole, config), of_before = inject(*before, config);
  const Adapters of_after = inject(*after, config);
  randomise(of_whole);
  std::stringstream stream, resumed;
  torch::save(whole, stream);
  torch::load(before, stream);
  train_some(whole, 0, 8);
  train_some(before, 0, 4);
  torch::save(before, resumed);
  train_some(after, 20, 30);  // norms of another training: the archive's take their place
  torch::load(after, resumed);
  train_some(after, 4, 8);
  const std::vector<LayerMerge> wanted = of_whole.plan("input").layers();
  const std::vector<LayerMerge> got = of_after.plan("input").layers();
  for (size_t n = 0; n < wanted.size(); ++n) {
    ASSERT_EQ(got[n].alpha_star.size(), wanted[n].alpha_star.size());
    for (size_t k = 0; k < wanted[n].alpha_star.size(); ++k)
      EXPECT_NEAR(got[n].alpha_star[k], wanted[n].alpha_star[k], 1e-6);
  }
}

TEST(Archives, WithoutNormsLeaveNone) {
  Net untrained, trained;
  inject(*untrained, config_of());
  inject(*trained, config_of());
  train_some(trained, 0, 1);
  std::stringstream stream;
  torch::save(untrained, stream);
  torch::load(trained, stream);
  EXPECT_FALSE(trained->layers[0]->as<testing::BlockImpl>()->q_proj->norms.is_defined());
}

TEST(Saving, KeepsTheModeOfTheFilesThatItReplaces) {
  Net net;
  const Adapters adapters = inject(*net, config_of());
  const std::string folder = testing::new_folder();
  const std::string weights = folder + "/adapter_model.safetensors";
  adapters.save(folder);
  const auto mode_of = [&] {
    struct stat status;
    EXPECT_EQ(::stat(weights.c_str(), &status), 0);
    return status.st_mode & 07777;
  };
  ASSERT_EQ(::chmod(weights.c_str(), 0640), 0);
  adapters.save(folder);
  EXPECT_EQ(mode_of(), 0640U);
}

TEST(Saving, NamesThePlaceOfTheFileAndNoHiddenOne) {
  Net net;
  const Adapters adapters = inject(*net, config_of().modules_to_save({"head"}));
  net->head->weight.set_data(torch::empty({0, kWidth}));  // as a sharded trainer leaves it
  const std::string folder = testing::new_folder();
  EXPECT_TRUE(refuses([&] { adapters.save(folder); }, folder + "/adapter_model.safetensors': "));
}

TEST(Saving, RefusesHeadsThatAFileCannotHoldBeforeTheTraining) {
  for (const at::Tensor& buffer : {torch::zeros({2}, at::kComplexFloat), torch::empty({0})}) {
    Net net;
    net->head->register_buffer("phases", buffer);
    EXPECT_TRUE(refuses([&] { inject(*net, config_of().modules_to_save({"head"})); },
                        "[inject] modules_to_save must fit into an adapter's file: tensor "
                        "'head.phases'"));
    EXPECT_FALSE(net->layers[0]->as<testing::BlockImpl>()->q_proj->is_adapted());
    inject(*net, config_of());  // no head
  }
  Net net;
  net->head->register_buffer("later", torch::empty({2}, at::kMeta));
  EXPECT_EQ(inject(*net, config_of().modules_to_save({"head"})).parameters().size(), 18U);
}

/// Runs a test in a folder of its own.
class InNewFolder {
 public:
  InNewFolder() : before_(::open(".", O_RDONLY | O_DIRECTORY)) {
    EXPECT_EQ(::chdir(testing::new_folder().c_str()), 0);
  }
  ~InNewFolder() {
    EXPECT_EQ(::fchdir(before_), 0);
    ::close(before_);
  }

 private:
  int before_;
};

TEST(Saving, AnEmptyPathIsTheFolderThatTheProgramRunsIn) {
  const InNewFolder guard;
  Net net, other;
  const Adapters adapters = inject(*net, config_of("none"));
  randomise(adapters);
  save_tensors("model.safetensors", {base_tensors(*net), {}});
  const std::string base = tensors_sum(load_tensors("model.safetensors").tensors);
  adapters.save("");
  load_base_tensors(*other, base_tensors(*net));
  load(*other, "");
  const at::Tensor x = torch::randn({3, kWidth});
  EXPECT_TRUE(torch::equal(net->forward(x), other->forward(x)));
  EXPECT_TRUE(refuses([&] { adapters.export_lora(""); }, "must not hold an unmerged adapter"));
  EXPECT_TRUE(refuses([] { merge_files({"model.safetensors"}, "", ""); },
                      "an output must be a new file; got model.safetensors"));
  EXPECT_EQ(tensors_sum(load_tensors("model.safetensors").tensors), base);
}

TEST(BaseTensors, AreCopiedAllOrNone) {
  Net net;
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [name, tensor] : base_tensors(*net)) tensors[name] = tensor.detach() + 1;
  const at::Tensor first = net->head->bias.detach().clone();  // "head.bias" is copied before
  tensors["layers.3.v_proj.weight"] = tensors["layers.3.v_proj.weight"].to_sparse();
  EXPECT_TRUE(refuses([&] { load_base_tensors(*net, tensors); }, "layers.3.v_proj.weight"));
  EXPECT_TRUE(torch::equal(first, net->head->bias));
}

}  // namespace
}  // namespace reslora
