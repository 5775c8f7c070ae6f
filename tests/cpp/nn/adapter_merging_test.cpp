// Adapted models calibrated, merged and saved, and merging of files.
#include <gtest/gtest.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/merge_files.h>
#include <reslora/plain_lora.h>
#include <sys/stat.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>

#include "small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

class Merging : public ::testing::TestWithParam<const char*> {};

TEST_P(Merging, MergeUnmergeAndExport) {
  torch::manual_seed(3);
  Net net;
  const Adapters adapters = inject(*net, config_of(GetParam()));
  randomise(adapters);
  net->eval();
  const torch::NoGradGuard no_grad;
  const at::Tensor x = torch::randn({200, kWidth});
  const at::Tensor wanted = net->forward(x);
  adapters.calibrate(std::vector{x}, [&](const at::Tensor& batch) { return net->forward(batch); });
  const std::string folder = new_folder();
  adapters.export_lora(folder);
  const at::Tensor weight = net->layers[1]->as<BlockImpl>()->v_proj->weight.clone();
  int64_t calls = 0;
  const MergePlan& plan = adapters.merge("", [&](int64_t) { ++calls; });
  EXPECT_EQ(calls, 8);
  EXPECT_TRUE(adapters.is_merged());
  const double error = distance(net->forward(x), wanted);
  const std::string mode = GetParam();
  EXPECT_EQ(error < 1e-5, mode == "none" || mode == "bs") << error;
  EXPECT_LT(error, 0.5);
  EXPECT_TRUE(refuses([&] { adapters.merge(); }, "must not be merged yet"));
  EXPECT_TRUE(refuses([&] { adapters.set_enabled(true); }, "must not be merged"));

  const TensorFile lora = load_tensors(folder + "/adapter_model.safetensors");
  const std::string key = "base_model.model.layers.1.v_proj.lora_";
  const at::Tensor product =
      lora.tensors.at(key + "B.weight").matmul(lora.tensors.at(key + "A.weight"));
  EXPECT_TRUE(torch::allclose(net->layers[1]->as<BlockImpl>()->v_proj->weight, weight + product,
                              1e-5, 1e-6));
  EXPECT_EQ(plan.layers().size(), 8U);
  adapters.unmerge();
  EXPECT_TRUE(torch::equal(net->layers[1]->as<BlockImpl>()->v_proj->weight, weight));
  EXPECT_TRUE(torch::equal(net->forward(x), wanted));
  EXPECT_TRUE(refuses([&] { adapters.unmerge(); }, "must be merged"));
}

/// One step that changes A and B, the same for models of one seed.
void train(const Adapters& adapters) {
  const torch::NoGradGuard no_grad;
  for (at::Tensor parameter : adapters.parameters()) parameter.mul_(1.25).add_(0.05);
}

TEST_P(Merging, TrainingThatGoesOnAfterLoadingIsMergedAndExported) {
  torch::manual_seed(3);
  Net net, other;
  const Adapters adapters = inject(*net, config_of(GetParam()));
  randomise(adapters);
  const at::Tensor x = torch::randn({200, kWidth});
  net->forward(x).sum().backward();  // fills norm windows
  const std::string folder = new_folder();
  adapters.save(folder + "/saved", /*statistics=*/true);
  load_base_tensors(*other, base_tensors(*net));
  const Adapters loaded = load(*other, folder + "/saved");
  std::vector<std::string> exported;
  for (const Adapters& own : {adapters, loaded}) {
    train(own);
    own.export_lora(folder + "/lora");
    exported.push_back(
        tensors_sum(load_tensors(folder + "/lora/adapter_model.safetensors").tensors));
  }
  EXPECT_EQ(exported[0], exported[1]);
  other->eval();  // records no norms
  const at::Tensor unmerged = other->forward(x).detach();
  const std::string mode = GetParam();
  const bool is_exact = mode == "none" || mode == "bs";
  adapters.merge();
  EXPECT_EQ(loaded.merge().layers()[1].rule, is_exact ? MergeRule::kExact : MergeRule::kProjected);
  EXPECT_TRUE(torch::equal(other->forward(x), net->forward(x)));
  if (!is_exact) return;
  EXPECT_LT(distance(other->forward(x), unmerged), 1e-5);
}

TEST_P(Merging, TrainingThatGoesOnAfterCalibratingIsRefusedWhereAFitIsReadAlone) {
  Net net;
  const Adapters adapters = inject(*net, config_of(GetParam()));
  randomise(adapters);
  net->eval();
  const at::Tensor x = torch::randn({200, kWidth});
  adapters.calibrate(std::vector{x}, [&](const at::Tensor& batch) { return net->forward(batch); });
  train(adapters);
  const std::string mode = GetParam();
  if (mode == "is" || mode == "ms") {
    EXPECT_TRUE(refuses([&] { adapters.merge(); }, "got fits made before it changed"));
    return;
  }
  const at::Tensor unmerged = net->forward(x).detach();
  adapters.merge();
  EXPECT_LT(distance(net->forward(x), unmerged), 1e-5);
}

TEST(Calibrate, DemandsEvalModeAndFitsOfTheAdapterAsItIs) {
  Net net;
  const Adapters adapters = inject(*net, config_of());
  randomise(adapters);
  const std::vector<at::Tensor> batches = {torch::randn({50, kWidth}), torch::randn({9, kWidth})};
  const auto run = [&](const at::Tensor& batch) { net->forward(batch); };
  EXPECT_TRUE(refuses([&] { adapters.calibrate(batches, run); }, "call model->eval() first"));
  net->eval();
  EXPECT_TRUE(refuses([&] { adapters.calibrate(std::vector<at::Tensor>(), run); },
                      "got none for layer layers.1.q_proj"));
  adapters.calibrate(batches, run);
  EXPECT_EQ(adapters.plan().layers()[1].rule, MergeRule::kLsq);
  const std::string folder = new_folder();
  adapters.save(folder, /*statistics=*/true);
  Net other;
  load_base_tensors(*other, base_tensors(*net));
  const Adapters loaded = load(*other, folder);
  EXPECT_TRUE(torch::equal(loaded.plan().layers()[1].A, adapters.plan().layers()[1].A));
  randomise(adapters);
  EXPECT_TRUE(refuses([&] { adapters.plan(); }, "fits made before it changed"));
  EXPECT_TRUE(refuses([&] { adapters.save(folder, true); }, "fits made before it changed"));
  EXPECT_NO_THROW(adapters.plan("weight"));
}

TEST(Calibrate, MovesTapsWhereTheOutputIsNearerThen) {
  torch::manual_seed(5);
  Net net(6);
  const Adapters adapters = inject(*net, config_of("ms"));
  randomise(adapters);
  net->eval();
  const torch::NoGradGuard no_grad;
  const std::vector<at::Tensor> batches = {torch::randn({300, kWidth})};
  const at::Tensor wanted = net->forward(batches[0]);
  const auto error = [&] {
    adapters.merge("lsq");
    const double found = distance(net->forward(batches[0]), wanted);
    adapters.unmerge();
    return found;
  };
  adapters.calibrate(batches, [&](const at::Tensor& batch) { net->forward(batch); });
  const double apart = error();
  EXPECT_EQ(adapters.plan().layers()[7].A.size(0), 2);
  adapters.calibrate(batches, [&](const at::Tensor& batch) { return net->forward(batch); });
  EXPECT_LT(error(), 0.9 * apart);
  EXPECT_EQ(adapters.plan().layers()[7].A.size(0), 4) << "v_proj adds to the stream";
}

TEST(Calibrate, MayShuffleAndKeepsEarlierFitsAfterAnError) {
  torch::manual_seed(5);
  Net net(4);
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  net->eval();
  const torch::NoGradGuard no_grad;
  auto data = torch::data::datasets::TensorDataset(torch::randn({64, kWidth}))
                  .map(torch::data::transforms::Stack<torch::data::TensorExample>());
  auto loader = torch::data::make_data_loader(std::move(data), 16);  // draws an order each time
  std::vector<double> errors;
  const at::Tensor x = torch::randn({50, kWidth}), wanted = net->forward(x);
  for (int k = 0; k < 8; ++k) {
    adapters.calibrate(*loader, [&](const auto& batch) { return net->forward(batch.data); });
    adapters.merge("lsq");
    errors.push_back(distance(net->forward(x), wanted));
    adapters.unmerge();
  }
  const auto [least, most] = std::minmax_element(errors.begin(), errors.end());
  EXPECT_LT(*most, 1.2 * *least);
  const std::vector<at::Tensor> uneven = {torch::randn({3, kWidth}), torch::randn({90, kWidth})};
  adapters.calibrate(uneven, [&](const at::Tensor& batch) { return net->forward(batch); });

  const at::Tensor before = adapters.plan("lsq").layers()[1].A.clone();
  for (const int last : {1, 2, 3, 5}) {
    int calls = 0;
    const auto failing = [&](const at::Tensor& batch) {
      TORCH_CHECK(++calls <= last, "stopped");
      return net->forward(batch);
    };
    EXPECT_THROW(adapters.calibrate(std::vector<at::Tensor>{x.slice(0, 0, 20), x}, failing),
                 c10::Error);
    EXPECT_FALSE(adapters.is_merged());
    EXPECT_TRUE(torch::equal(adapters.plan("lsq").layers()[1].A, before));
  }
}

TEST(Save, LeavesWhatLiesThereWholeWhereItFails) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of("is"));
  randomise(adapters);
  net->forward(torch::randn({5, kWidth}));
  const std::string folder = new_folder(), config = folder + "/adapter_config.json";
  adapters.save(folder, /*statistics=*/true);
  const std::string before =
      tensors_sum(load_tensors(folder + "/adapter_model.safetensors").tensors);
  ASSERT_EQ(::unlink(config.c_str()), 0);
  ASSERT_EQ(::mkdir(config.c_str(), 0777), 0);  // a folder in the way of the last file
  randomise(adapters);
  EXPECT_TRUE(refuses([&] { adapters.save(folder); }, "must be a file to write"));
  EXPECT_EQ(tensors_sum(load_tensors(folder + "/adapter_model.safetensors").tensors), before);
  EXPECT_NO_THROW(load_tensors(folder + "/adapter_statistics.safetensors"));
  ASSERT_EQ(::rmdir(config.c_str()), 0);
  adapters.save(folder);
  EXPECT_ANY_THROW(load_tensors(folder + "/adapter_statistics.safetensors"));
}

TEST(Export, LeavesWhatLiesThereWholeWhereItFails) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of("none"));
  randomise(adapters);
  const std::string folder = new_folder(), config = folder + "/adapter_config.json";
  const std::string weights = folder + "/adapter_model.safetensors";
  adapters.export_lora(folder);
  const std::string before = tensors_sum(load_tensors(weights).tensors);
  randomise(adapters);
  const ExportOptions bad = ExportOptions().base_model_name_or_path("\xff");
  EXPECT_TRUE(refuses([&] { adapters.export_lora(folder, bad); }, "text must be UTF-8"));
  EXPECT_TRUE(refuses([&] { adapters.export_lora(folder + "/new", bad); }, "text must be UTF-8"));
  EXPECT_NE(::access((folder + "/new").c_str(), F_OK), 0);
  EXPECT_EQ(tensors_sum(load_tensors(weights).tensors), before);
  ASSERT_EQ(::unlink(config.c_str()), 0);
  ASSERT_EQ(::mkdir(config.c_str(), 0777), 0);
  EXPECT_TRUE(refuses([&] { adapters.export_lora(folder); }, "must be a file to write"));
  EXPECT_EQ(tensors_sum(load_tensors(weights).tensors), before);
  PlainLora empty;
  empty.layers = {LayerMerge()};
  EXPECT_TRUE(refuses([&] { save_plain_lora(folder + "/new", empty); }, "must have factors"));
  EXPECT_TRUE(refuses([&] { reduced_factors(LayerMerge(), 1); }, "must have factors"));
}

TEST(Export, RefusesTheBiasOfAnAffineFitAndWritesTheLinearOne) {
  torch::manual_seed(4);
  Net net;
  const Adapters adapters = inject(*net, config_of("is").target_modules({"q_proj"}));
  randomise(adapters);
  net->eval();
  const torch::NoGradGuard no_grad;
  const at::Tensor x = torch::randn({300, kWidth}) + 2;
  FitOptions options;
  options.affine = true;
  adapters.calibrate(
      std::vector{x}, [&](const at::Tensor& batch) { return net->forward(batch); }, options);
  const std::string folder = new_folder() + "/lora";
  PlainLora lora;
  lora.layers = adapters.plan().layers();
  ASSERT_GT(lora.layers[1].bias.abs().max().item<double>(), 0.01);
  const char* sentence = "plain LoRA holds no bias; got that of an affine fit (layer layers.1.";
  EXPECT_TRUE(refuses([&] { save_plain_lora(folder, lora); }, sentence));
  EXPECT_TRUE(refuses([&] { padded_factors(lora.layers[1], 8); }, sentence));
  adapters.merge();
  EXPECT_TRUE(refuses([&] { adapters.export_lora(folder); }, sentence));
  EXPECT_NE(::access(folder.c_str(), F_OK), 0);
  adapters.unmerge();

  lora.layers = adapters.plan("", /*use_affine=*/false).layers();
  save_plain_lora(folder, lora);
  MergePlan linear(adapters.views(), "lsq", /*use_affine=*/false);
  const TensorFile file = load_tensors(folder + "/adapter_model.safetensors");
  const ResLoraLinear& layer = net->layers[1]->as<BlockImpl>()->q_proj;
  const std::string key = "base_model.model.layers.1.q_proj.lora_";
  const at::Tensor wanted =
      layer->weight + file.tensors.at(key + "B.weight").matmul(file.tensors.at(key + "A.weight"));
  linear.apply();
  EXPECT_TRUE(torch::allclose(layer->weight, wanted, 1e-5, 1e-6));
  linear.revert();
}

TEST(Merge, IsKeptInTheArchivesOfTorchSave) {
  Net net(2), plain(2), other(2);
  const Adapters adapters = inject(*net, config_of("none"));
  inject(*other, config_of("none"));
  randomise(adapters);
  std::stringstream unmerged, merged;
  torch::save(net, unmerged);
  adapters.merge();
  torch::save(net, merged);
  EXPECT_TRUE(
      refuses([&] { torch::load(other, merged); }, "of a merged model must be loaded into"));
  EXPECT_TRUE(refuses([&] { torch::load(net, unmerged); }, "of an unmerged model must be loaded"));
  const at::Tensor x = torch::randn({5, kWidth});
  for (std::stringstream* stream : {&unmerged, &merged}) {
    stream->clear();
    stream->seekg(0);
  }
  torch::load(plain, merged);
  EXPECT_TRUE(torch::equal(plain->forward(x), net->forward(x)));
  adapters.unmerge();
  torch::load(other, unmerged);
  EXPECT_TRUE(torch::equal(other->forward(x), net->forward(x)));
}

TEST(Merge, RestoresWhatWasSwitchedOff) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of("bs"));
  randomise(adapters);
  const at::Tensor x = torch::randn({5, kWidth});
  adapters.set_enabled(false);
  const at::Tensor base = net->forward(x);
  adapters.merge();
  EXPECT_FALSE(torch::allclose(net->forward(x), base));
  auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  adapters.unmerge();
  EXPECT_TRUE(torch::equal(net->forward(x), base));
  EXPECT_TRUE(refuses([&] { adapters.of_clone(*copy); }, "must be of an unmerged model"));
  EXPECT_TRUE(refuses([&] { adapters.of_clone(*net); }, "must be a clone"));
}

TEST(MergeFiles, GiveWhatMergingTheModelGives) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of("is").modules_to_save({"head"}));
  randomise(adapters);
  const at::Tensor x = torch::randn({5, kWidth});
  for (int step = 0; step < 3; ++step) net->forward(x);
  const std::string folder = new_folder();
  TensorFile shards[2];
  for (const auto& [name, tensor] : base_tensors(*net))
    shards[name.find("layers.0") == 0 ? 0 : 1].tensors.emplace(name, tensor.detach());
  shards[0].metadata = {{"format", "pt"}};
  const std::vector<std::string> base = {folder + "/one.safetensors", folder + "/two.safetensors"};
  for (size_t k = 0; k < 2; ++k) save_tensors(base[k], shards[k]);
  adapters.save(folder + "/adapter", /*statistics=*/true);
  int64_t bytes = 0;
  MergeFilesOptions options;
  options.progress = [&](int64_t now) { bytes = now; };
  const auto layers = merge_files(base, folder + "/adapter", folder + "/merged", options);
  EXPECT_EQ(layers[1].rule, MergeRule::kProjected);
  EXPECT_GT(bytes, 0);

  adapters.merge();
  TensorFile merged = load_tensors(folder + "/merged/one.safetensors");
  EXPECT_EQ(merged.metadata, shards[0].metadata);
  merged.tensors.merge(load_tensors(folder + "/merged/two.safetensors").tensors);
  Net plain(2);
  load_base_tensors(*plain, merged.tensors);
  EXPECT_TRUE(torch::equal(plain->forward(x), net->forward(x)));

  const auto again = [&](const std::vector<std::string>& from, const std::string& to) {
    return [=] { merge_files(from, folder + "/adapter", folder + to); };
  };
  EXPECT_TRUE(refuses(again(base, "/merged"), "an output must be a new file; got"));
  EXPECT_TRUE(refuses(again({base[0]}, "/other"), "got none for layers.1.q_proj among"));
  ASSERT_EQ(::mkdir((folder + "/half").c_str(), 0777), 0);
  ASSERT_EQ(::mkdir((folder + "/half/two.safetensors").c_str(), 0777), 0);
  EXPECT_TRUE(refuses(again(base, "/half"), "an output must be a new file; got"));
  EXPECT_ANY_THROW(load_tensors(folder + "/half/one.safetensors")) << "nothing was written";
  EXPECT_TRUE(refuses(again({}, "/other"), "the base must be files; got none"));
  TensorFile one = load_tensors(base[0]);
  one.tensors["layers.0.q_proj.weight"] = torch::zeros({3, kWidth});
  save_tensors(folder + "/bad.safetensors", one);
  EXPECT_TRUE(refuses(again({folder + "/bad.safetensors", base[1]}, "/other"),
                      "got [3, 8] for layers.0.q_proj.weight"));
}

INSTANTIATE_TEST_SUITE_P(All, Merging, ::testing::Values("none", "is", "bs", "ms"));

}  // namespace
}  // namespace reslora
