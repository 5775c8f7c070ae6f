// Models that hold a layer, a weight or a head under several names: what a file says of it, and
// that merges are right at every name or refused.
#include <gtest/gtest.h>
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/config_json.h>
#include <reslora/merge_files.h>
#include <torch/torch.h>

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

/// What an option is in the options of a folder, "" where it is not there.
std::string option_in(const std::string& folder, const std::string& name) {
  const ResLoraConfig config = load_saved_adapter(folder).config;
  for (const auto& [key, value] : config.other_options())
    if (key == name) return value;
  return "";
}

std::string saved(const Adapters& adapters) {
  std::string folder = new_folder();
  adapters.save(folder);
  return folder;
}

/// Merges into files that hold every name of the model's tensors.
std::map<std::string, at::Tensor> merged_in_files(const torch::nn::Module& model,
                                                  const std::string& adapter) {
  const std::string folder = new_folder(), out = folder + "/out";
  TensorFile base;
  for (const auto& [name, tensor] : base_tensors(model)) base.tensors.emplace(name, tensor.clone());
  save_tensors(folder + "/model.safetensors", base);
  merge_files({folder + "/model.safetensors"}, adapter, out);
  return load_tensors(out + "/model.safetensors").tensors;
}

TEST(Sharing, ALayerAtTwoPlacesIsNamedAndMergedAtBoth) {
  torch::nn::Sequential model, plain;
  ResLoraLinear shared(kWidth, kWidth);
  model->push_back(shared);
  model->push_back(ResLoraLinear(kWidth, kWidth));
  model->push_back(shared);
  const ResLoraConfig config = ResLoraConfig().r(2).res_mode("bs").target_modules(R"(\d+)");
  const Adapters adapters = inject(*model, config);
  randomise(adapters);
  const std::string folder = saved(adapters);
  EXPECT_EQ(option_in(folder, "other_places"), R"({"0":["2"]})");
  EXPECT_EQ(option_in(folder, "tied_weights"), "");
  EXPECT_TRUE(refuses([&] { adapters.export_lora(new_folder()); }, "hang at one place; got 0"));
  const auto files = merged_in_files(*model, folder);
  adapters.merge();
  for (const auto& [name, tensor] : base_tensors(*model))
    EXPECT_LT(distance(files.at(name), tensor), 1e-6) << name;

  for (int i = 0; i < 3; ++i) plain->push_back(ResLoraLinear(kWidth, kWidth));
  ResLoraConfig read = load_saved_adapter(folder).config;  // lists of the model that it is of
  EXPECT_EQ(option_in(saved(inject(*plain, read)), "other_places"), "");
}

/// A module with a weight that is somebody else's.
struct HolderImpl : torch::nn::Module {
  explicit HolderImpl(const at::Tensor& weight) { register_parameter("weight", weight); }
};
TORCH_MODULE(Holder);

/// A layer, a head and an embedding.
struct PartsImpl : torch::nn::Module {
  PartsImpl() {
    register_module("encoder", encoder);
    register_module("head", head);
    register_module("embedding", embedding);
  }
  ResLoraLinear encoder{kWidth, kWidth};
  torch::nn::Linear head{kWidth, 3};
  torch::nn::Embedding embedding{3, kWidth};
};
TORCH_MODULE(Parts);

TEST(Sharing, AWeightOfTwoModulesIsMergedNowhere) {
  Parts model;
  model->register_module("decoder", Holder(model->encoder->weight));
  const Adapters adapters = inject(*model, config_of("none").target_modules({"encoder"}));
  randomise(adapters);
  const std::string folder = saved(adapters);
  EXPECT_EQ(option_in(folder, "tied_weights"), R"({"encoder":["decoder.weight"]})");
  const std::string sentence = "got those of encoder, where decoder.weight is the same tensor";
  EXPECT_TRUE(refuses([&] { adapters.merge(); }, sentence));
  EXPECT_FALSE(adapters.is_merged());
  EXPECT_TRUE(refuses([&] { merged_in_files(*model, folder); }, sentence));
  adapters.export_lora(new_folder());
}

TEST(Sharing, MemoryCountsWhateverTensorLiesInIt) {
  const auto refused = [](const std::function<void(Parts&)>& tie, const std::string& name) {
    Parts model;
    tie(model);
    const Adapters adapters = inject(*model, config_of("none").target_modules({"encoder"}));
    EXPECT_EQ(option_in(saved(adapters), "tied_weights"), R"({"encoder":[")" + name + R"("]})");
    EXPECT_TRUE(refuses([&] { adapters.merge(); }, "got those of encoder, where " + name));
  };
  refused(
      [](Parts& model) {
        model->register_module("decoder", Holder(model->encoder->weight.detach().t()));
      },
      "decoder.weight");
  refused(
      [](Parts& model) {
        model->register_buffer("copied", model->encoder->weight.detach().narrow(0, 2, 1));
      },
      "copied");
  refused([](Parts& model) { model->embedding->weight = model->encoder->weight; },
          "embedding.weight");  // the member is what its forward reads
  Parts model;
  at::Tensor both = at::randn({2 * kWidth, kWidth});
  model->encoder->weight.set_data(both.narrow(0, 0, kWidth));
  model->register_buffer("beside", both.narrow(0, kWidth, kWidth));  // another part of one storage
  const Adapters adapters = inject(*model, config_of("none").target_modules({"encoder"}));
  EXPECT_EQ(option_in(saved(adapters), "tied_weights"), "");
  adapters.merge();
}

TEST(Sharing, ACloneIsWhatItIs) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of().modules_to_save({"head"}));
  const auto clone = std::dynamic_pointer_cast<NetImpl>(net->clone());
  const Adapters of_clone = adapters.of_clone(*clone);
  clone->head->weight = net->head->weight;
  EXPECT_EQ(option_in(saved(of_clone), "tied_weights"), "");
  of_clone.merge();
}

TEST(Sharing, AHeadOfTwoModulesIsMergedInMemoryOnly) {
  Parts model;
  model->register_module("also", model->head);
  const auto config = config_of("none").target_modules({"encoder"}).modules_to_save({"head"});
  const Adapters adapters = inject(*model, config);
  const std::string folder = saved(adapters);
  EXPECT_EQ(option_in(folder, "tied_weights"),
            R"({"head.bias":["also.bias"],"head.weight":["also.weight"]})");
  EXPECT_TRUE(refuses([&] { merged_in_files(*model, folder); }, "got those of head.bias"));
  adapters.merge();
  EXPECT_TRUE(adapters.is_merged());
}

TEST(Sharing, AnEmbeddingAndItsHeadAreLeftToTheFiles) {
  Parts model;
  model->register_module("output", Holder(model->embedding->weight));
  const auto config = config_of("none").target_modules({"encoder"}).modules_to_save({"output"});
  EXPECT_EQ(option_in(saved(inject(*model, config)), "tied_weights"), "");
}

}  // namespace
}  // namespace reslora
