// A model adapted by names: what is matched, what is refused, and every use of the handle.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <reslora/adapter_io.h>
#include <reslora/adapters.h>
#include <reslora/config_json.h>
#include <torch/torch.h>

#include <fstream>
#include <sstream>
#include <thread>

#include "small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

TEST(Inject, AdaptsByNameAndFreezesTheRest) {
  Net net;
  const at::Tensor x = torch::randn({5, kWidth});
  const at::Tensor before = net->forward(x);
  const Adapters adapters = inject(*net, config_of());
  EXPECT_TRUE(torch::allclose(net->forward(x), before)) << "B starts at zero";
  EXPECT_EQ(adapters.names(), (std::vector<std::string>{"layers.*.q_proj", "layers.*.v_proj"}));
  EXPECT_EQ(adapters.parameters().size(), 16U);
  int64_t trained = 0;
  for (const at::Tensor& parameter : net->parameters()) trained += parameter.requires_grad();
  EXPECT_EQ(trained, 16);
  net->forward(x).sum().backward();
  for (const at::Tensor& parameter : adapters.parameters()) EXPECT_TRUE(parameter.grad().defined());
}

TEST(Inject, MatchesAsPythonDoes) {
  const auto matched = [](const ResLoraConfig& config) {
    Net net(3);
    return adapted_names(inject(*net, config));
  };
  using Names = std::vector<std::string>;
  const ResLoraConfig base = ResLoraConfig().r(2);
  EXPECT_EQ(matched(ResLoraConfig(base).target_modules(R"(layers\.[02]\..*q.*)")),
            (Names{"layers.0.q_proj", "layers.2.q_proj"}));
  EXPECT_EQ(matched(ResLoraConfig(base).target_modules({"1.v_proj"})), Names{"layers.1.v_proj"});
  EXPECT_EQ(matched(ResLoraConfig(base).target_modules({"q_proj"}).layers_to_transform({1, 2})),
            (Names{"layers.1.q_proj", "layers.2.q_proj"}));
  const auto indexed = ResLoraConfig(base).target_modules({"q_proj"}).layers_to_transform({1});
  EXPECT_EQ(matched(ResLoraConfig(indexed).layers_pattern({"layers"})), Names{"layers.1.q_proj"});
  EXPECT_THROW(matched(ResLoraConfig(indexed).layers_pattern({"blocks"})), c10::Error);
  EXPECT_EQ(matched(ResLoraConfig(base)
                        .target_modules("all-linear")
                        .exclude_modules({"head", "v_proj"})
                        .layers_to_transform({0})),
            Names{"layers.0.q_proj"});
}

TEST(Inject, TakesRanksAndScalingsByPattern) {
  Net net(2);
  const Adapters adapters = inject(
      *net, config_of("none").rank_pattern({{R"(0\.q_proj)", 3}}).alpha_pattern({{"v_proj", 6}}));
  const Chain& q = adapters.chains()[0].chain();
  EXPECT_EQ(q.layer(0).r, 3);
  EXPECT_EQ(q.layer(1).r, 2);
  EXPECT_DOUBLE_EQ(q.layer(0).scaling, 4.0 / 3);
  EXPECT_DOUBLE_EQ(adapters.chains()[1].chain().layer(1).scaling, 3);
}

TEST(Inject, FillsAsAsked) {
  Net gaussian(1), random(1);
  const Adapters a = inject(*gaussian, config_of().init_lora_weights("gaussian"));
  const Adapters b = inject(*random, config_of().init_lora_weights(false));
  EXPECT_EQ(a.parameters()[1].abs().max().item<double>(), 0);
  EXPECT_GT(b.parameters()[1].abs().max().item<double>(), 0);
}

TEST(Inject, TakesQueriesAndValuesWhereNoTargetsAreNamed) {
  Net net(2);
  const Adapters adapters = inject(*net, ResLoraConfig().r(2));
  EXPECT_EQ(adapters.names(), (std::vector<std::string>{"layers.*.q_proj", "layers.*.v_proj"}));
  EXPECT_EQ(adapters.config().target_modules(), ModuleNames({"q_proj", "v_proj"}));
  torch::nn::Sequential other{ResLoraLinear(4, 4)};
  EXPECT_TRUE(refuses([&] { inject(*other, ResLoraConfig()); },
                      "target_modules must be given; got none (candidates: 0; or"));
}

struct Bad {
  ResLoraConfig config;
  const char* sentence;
};

TEST(Inject, RefusesInOneSentenceAndChangesNothing) {
  const ResLoraConfig base = ResLoraConfig().r(2);
  const Bad bad[] = {
      {ResLoraConfig(base).target_modules({"nope"}), "got 'nope', which matches nothing"},
      {ResLoraConfig(base).target_modules({"q_proj", "nope"}), "got 'nope'"},
      {ResLoraConfig(base).target_modules("(("), "must be a regular expression"},
      {ResLoraConfig(base).target_modules(std::vector<std::string>{}), "got an empty list"},
      {ResLoraConfig(base).target_modules({"head"}),
       "got head: declare this member as reslora::ResLoraLinear"},
      {ResLoraConfig(base).target_modules("all-linear"), "got head: declare"},
      {ResLoraConfig(base).target_modules({"norm"}),
       "must be linear layers that are called; got layers.0.norm (LayerNorm)"},
      {config_of().exclude_modules(".*"), "matches none that is not excluded"},
      {config_of().layers_to_transform({7}), "layers_to_transform must name layers"},
      {config_of().rank_pattern({{"k_proj", 3}}), "rank_pattern must match adapted layers"},
      {config_of().modules_to_save({"nope"}), "modules_to_save must match modules"},
      {config_of().res_mode("xs"), "res_mode must be"},
      {config_of().rank_pattern({{R"(1\.v_proj)", int64_t{1} << 45}}),
       "the adapter of layers.1.v_proj could not be made with r = "},
      {config_of().rank_pattern({{"[", 2}}), "got '['"},
      {config_of().init_lora_weights("zeros"), "init_lora_weights must be"},
      {config_of().merge_method("best"), "merge_method must be"},
      {config_of().modules_to_save({"layers"}), "not excluded or in modules_to_save"},
      {config_of().other_options({{"note", "{"}}), "[config] the options"},
      {config_of().other_options({{"r", "7"}}), "[config] the options"},
  };
  for (const Bad& one : bad) {
    Net net(2);
    EXPECT_TRUE(refuses([&] { inject(*net, one.config); }, one.sentence));
    for (const auto& item : net->named_parameters()) {
      EXPECT_TRUE(item.value().requires_grad());
      EXPECT_EQ(item.key().find("reslora"), std::string::npos);
    }
  }
  Net net(2);
  const Adapters adapters = inject(*net, config_of());
  EXPECT_TRUE(refuses([&] { inject(*net, config_of()); }, "adapted already"));
  ResLoraLinear alone(kWidth, kWidth);
  EXPECT_TRUE(refuses([&] { inject(*alone, config_of()); }, "the model must hold the layers"));
}

TEST(Inject, ASharedLayerIsAdaptedOnce) {
  torch::nn::Sequential model;
  ResLoraLinear shared(kWidth, kWidth);
  model->push_back(shared);
  model->push_back(ResLoraLinear(kWidth, kWidth));
  model->push_back(shared);
  const Adapters adapters = inject(*model, ResLoraConfig().r(2).target_modules(R"(\d+)"));
  EXPECT_EQ(adapted_names(adapters), (std::vector<std::string>{"0", "1"}));
  EXPECT_EQ(adapters.names(), std::vector<std::string>{"*"});
  EXPECT_EQ(model->forward(torch::randn({3, kWidth})).sizes(), (std::vector<int64_t>{3, kWidth}));
}

TEST(Inject, TrainsAHead) {
  Net net(2);
  const Adapters adapters = inject(*net, config_of().modules_to_save({"head"}));
  EXPECT_TRUE(net->head->weight.requires_grad());
  EXPECT_FALSE(net->layers[0]->as<BlockImpl>()->norm->weight.requires_grad());
  EXPECT_EQ(adapters.parameters().size(), 10U);
  randomise(adapters);
  const std::string folder = new_folder();
  adapters.save(folder);
  Net other(2);
  load_base_tensors(*other, base_tensors(*net));
  torch::nn::init::zeros_(other->head->weight);
  load(*other, folder);
  const at::Tensor x = torch::randn({5, kWidth});
  EXPECT_TRUE(torch::equal(net->forward(x), other->forward(x)));
}

TEST(Links, AreListedWithWhatIsMissing) {
  Net net(3);
  const Adapters adapters = inject(*net, config_of("ms"));
  EXPECT_EQ(adapters.links(),
            "layers.*.q_proj: ms, 3 layers, 2 linked\nlayers.*.v_proj: ms, 3 layers, 2 linked\n");
  net->layers[1]->as<BlockImpl>()->forward(torch::randn({2, kWidth}));
  EXPECT_NE(adapters.links().find("layers.1.q_proj: 1 times without a tap"), std::string::npos);
}

class Modes : public ::testing::TestWithParam<const char*> {};

TEST_P(Modes, SaveAndLoadGiveTheSameModel) {
  Net net;
  const Adapters adapters = inject(*net, config_of(GetParam()));
  randomise(adapters);
  const at::Tensor x = torch::randn({5, kWidth});
  net->forward(x).sum().backward();  // fills norm windows
  const std::string folder = new_folder() + "/deep/er";
  adapters.save(folder, /*statistics=*/true);
  Net plain;
  load_base_tensors(*plain, base_tensors(*net));
  const Adapters loaded = load(*plain, folder);
  EXPECT_EQ(loaded.views()[0].layers[1].norms.filled(), 1);
  EXPECT_TRUE(torch::equal(net->forward(x), plain->forward(x)));
  EXPECT_EQ(config_to_json(loaded.config()), config_to_json(adapters.config()));

  Net three(3), other(4);
  EXPECT_TRUE(refuses([&] { load(*three, folder); }, "got chain layers.*.q_proj with 3 layers"));
  EXPECT_FALSE(three->layers[0]->as<BlockImpl>()->q_proj->is_adapted());
  const Adapters different = inject(*other, config_of().res_mode("none").pre_num(0));
  EXPECT_TRUE(refuses([&] { different.load(folder); }, "model and file must agree on"));
}

TEST_P(Modes, AClonedModelHasAdaptersOfItsOwn) {
  Net net;
  const Adapters adapters = inject(*net, config_of(GetParam()).modules_to_save({"head"}));
  randomise(adapters);
  auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  const Adapters own = adapters.of_clone(*copy);
  const at::Tensor x = torch::randn({5, kWidth});
  const at::Tensor wanted = net->forward(x).detach();
  EXPECT_TRUE(torch::equal(copy->forward(x), wanted));
  EXPECT_EQ(own.parameters().size(), adapters.parameters().size());
  EXPECT_FALSE(copy->layers[0]->as<BlockImpl>()->norm->weight.requires_grad());
  randomise(own);
  EXPECT_TRUE(torch::equal(net->forward(x), wanted));
  EXPECT_FALSE(torch::equal(copy->forward(x), wanted));
}

TEST(Load, TakesOverWhichLinksAreLeftOut) {
  Net net, plain, adapted;
  load_base_tensors(*plain, base_tensors(*net));
  load_base_tensors(*adapted, base_tensors(*net));
  const Adapters adapters = inject(*net, config_of("ms").pre_num(2));
  randomise(adapters);
  const at::Tensor x = torch::randn({3, kWidth});
  const at::Tensor linked = net->forward(x);
  adapters.chains()[0].leave_out(2, {1});
  const at::Tensor want = net->forward(x);
  EXPECT_GT(distance(want, linked), 1e-3);
  const std::string folder = new_folder();
  adapters.save(folder);
  const Adapters loaded = load(*plain, folder);
  EXPECT_TRUE(at::equal(plain->forward(x), want));
  EXPECT_EQ(loaded.chains()[0].chain().reached(2), std::vector<int64_t>{0});
  EXPECT_EQ(loaded.chains()[0].missed_links(2), 0);
  inject(*adapted, config_of("ms").pre_num(2)).load(folder);
  EXPECT_TRUE(at::equal(adapted->forward(x), want));
}

TEST(Load, TakesTheLayersThatTheFileHolds) {
  Net net(3);
  const Adapters adapters = inject(*net, config_of("bs"));
  randomise(adapters);
  const std::string folder = new_folder();
  adapters.save(folder);
  const std::string path = folder + "/adapter_model.safetensors";
  AdapterFile file = load_adapter(path);
  // As PEFT saves it, which takes names that match nothing.
  file.config_json = config_to_json(
      ResLoraConfig(adapters.config()).target_modules({"q_proj", "v_proj", "gate_proj"}));
  save_adapter(path, file);
  std::ofstream(folder + "/adapter_config.json") << file.config_json;
  Net plain(3);
  load_base_tensors(*plain, base_tensors(*net));
  EXPECT_EQ(adapted_names(load(*plain, folder)), adapted_names(adapters));
  const at::Tensor x = torch::randn({5, kWidth});
  EXPECT_TRUE(torch::equal(plain->forward(x), net->forward(x)));
}

INSTANTIATE_TEST_SUITE_P(All, Modes, ::testing::Values("none", "is", "bs", "ms"));

TEST(Forward, NamesTheLayerAndDemandsStrictLinks) {
  Net net(3);
  const Adapters adapters = inject(*net, config_of("ms").strict_links(true));
  auto& second = *net->layers[1]->as<BlockImpl>();
  EXPECT_TRUE(refuses(
      [&] {
        second.q_proj->forward(torch::randn({2, kWidth}));
      },
      "strict_links demands every link; got layers.1.q_proj without one"));
  auto& first = *net->layers[0]->as<BlockImpl>();
  EXPECT_TRUE(refuses(
      [&] {
        first.q_proj->forward(torch::randn({2, 5}));
      },
      "(layer layers.0.q_proj)"));
  EXPECT_TRUE(refuses([&] { first.q_proj->forward({}); }, "(layer layers.0.q_proj)"));
  EXPECT_TRUE(refuses(
      [&] {
        forward_together({nullptr}, torch::randn({2, kWidth}));
      },
      "needs layers"));
  EXPECT_NO_THROW(net->forward(torch::randn({2, kWidth})));
}

struct StackImpl : torch::nn::Module {
  StackImpl() {
    for (int n = 0; n < 4; ++n) layers->push_back(ResLoraLinear(6, 6));
    register_module("layers", layers);
    to(torch::kDouble);
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& layer : *layers) x = torch::tanh(layer->as<ResLoraLinearImpl>()->forward(x));
    return x;
  }
  torch::nn::ModuleList layers;
};
TORCH_MODULE(Stack);

void copy_file(const std::string& from, const std::string& to) {
  std::ifstream source(from, std::ios::binary);
  std::ofstream(to, std::ios::binary) << source.rdbuf();
}

class Parity : public ::testing::TestWithParam<const char*> {};

/// The folder that Python's save_pretrained wrote (tests/data/make_parity.py).
TEST_P(Parity, AFolderThatPythonWroteIsLoaded) {
  const std::string start = std::string(RESLORA_TEST_DATA) + "/parity_" + GetParam();
  const std::string folder = new_folder();
  copy_file(start + ".safetensors", folder + "/adapter_model.safetensors");
  std::ofstream(folder + "/adapter_config.json")
      << load_adapter(start + ".safetensors").config_json;
  TensorFile values = load_tensors(start + "_values.safetensors");
  const auto take = [&](const char* name) {
    const auto node = values.tensors.extract(name);
    return node ? node.mapped() : at::Tensor();
  };
  const at::Tensor x = take("x"), y = take("y"), merged = take("merged");
  Stack model;
  load_base_tensors(*model, values.tensors);
  if (merged.defined())
    copy_file(start + "_statistics.safetensors", folder + "/adapter_statistics.safetensors");
  const Adapters adapters = load(*model, folder);
  model->eval();
  EXPECT_TRUE(torch::allclose(model->forward(x), y, 1e-13, 1e-14));
  EXPECT_EQ(adapters.names(), std::vector<std::string>{"layers.*"});
  // What only Python knows is written back.
  EXPECT_NE(config_to_json(adapters.config()).find("\"bias\": \"none\""), std::string::npos);
  if (!merged.defined()) return;
  EXPECT_EQ(adapters.views()[0].layers[1].norms.filled(), 1);
  adapters.merge("lsq");
  EXPECT_TRUE(torch::allclose(model->forward(x), merged, 1e-13, 1e-14));
}

INSTANTIATE_TEST_SUITE_P(Files, Parity, ::testing::Values("none", "is", "bs2", "ms2", "msall"));

TEST(Programs, TwoThreadsTrainTwoModelsAndAThirdEvaluates) {
  Net nets[3];
  std::vector<Adapters> adapters;
  for (Net& net : nets) adapters.push_back(inject(*net, config_of("ms")));
  const at::Tensor x = torch::randn({7, kWidth});
  std::vector<at::Tensor> wanted;
  for (size_t k = 0; k < 3; ++k) {
    randomise(adapters[k]);
    wanted.push_back(nets[k]->forward(x).detach());
  }
  nets[2]->eval();
  std::vector<int64_t> wrong(3, 0);
  std::vector<std::thread> threads;
  for (size_t k = 0; k < 3; ++k)
    threads.emplace_back([&, k] {
      for (int step = 0; step < 50; ++step) {
        const at::Tensor y = nets[k]->forward(x);
        if (k < 2) y.sum().backward();
        wrong[k] += !torch::equal(y, wanted[k]);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, (std::vector<int64_t>{0, 0, 0}));
  for (const Adapters& own : adapters)
    EXPECT_EQ(own.links().find("without a tap"), std::string::npos);
}

TEST(Programs, UseLoadersArchivesTypesAndAutocast) {
  Net net(2), other(2);
  const Adapters adapters = inject(*net, config_of("bs")), twin = inject(*other, config_of("bs"));
  auto data = torch::data::datasets::TensorDataset(torch::randn({32, kWidth}))
                  .map(torch::data::transforms::Stack<torch::data::TensorExample>());
  auto loader = torch::data::make_data_loader(std::move(data), 8);
  torch::optim::AdamW optimizer(adapters.parameters(), 1e-2);
  for (auto& batch : *loader) {
    optimizer.zero_grad();
    net->forward(batch.data).square().mean().backward();
    optimizer.step();
  }
  const at::Tensor x = torch::randn({5, kWidth});
  std::stringstream archive;
  torch::save(net, archive);
  torch::load(other, archive);
  EXPECT_TRUE(torch::equal(net->forward(x), other->forward(x)));

  const at::Tensor wanted = net->forward(x).detach();
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const at::Tensor low = net->forward(x);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_EQ(low.scalar_type(), at::kBFloat16);
  EXPECT_LT(distance(low.to(at::kFloat), wanted), 2e-2);

  net->to(torch::kDouble);
  EXPECT_LT(distance(net->forward(x.to(torch::kDouble)), wanted.to(torch::kDouble)), 1e-5);
  net->eval();
  adapters.calibrate(
      *loader, [&](const auto& batch) { return net->forward(batch.data.to(torch::kDouble)); });
  EXPECT_NO_THROW(adapters.merge());
}

TEST(ConfigJson, GoesThroughTextUnchanged) {
  const ResLoraConfig config = ResLoraConfig()
                                   .r(4)
                                   .lora_alpha(2.5)
                                   .lora_dropout(0.1)
                                   .res_mode("ms")
                                   .pre_num(-1)
                                   .use_rslora(true)
                                   .norm_window(7)
                                   .first_block("plain")
                                   .detach_taps(true)
                                   .strict_links(true)
                                   .merge_method("lsq")
                                   .target_modules("all-linear")
                                   .exclude_modules({"a\"b", "c"})
                                   .layers_to_transform({1, 2})
                                   .rank_pattern({{"z", 3}, {"a", 5}})
                                   .alpha_pattern({{"q", 1.5}})
                                   .modules_to_save({"head"})
                                   .init_lora_weights("gaussian")
                                   .other_options({{"finish_at", "0.5"}});
  const std::string text = config_to_json(config);
  EXPECT_EQ(config_to_json(config_from_json(text)), text);
  EXPECT_EQ(config_from_json(text).rank_pattern()[0].first, "z");
  EXPECT_EQ(config_to_json(config_from_json("{}")), config_to_json(ResLoraConfig()));
}

TEST(ConfigJson, RefusesWhatIsNone) {
  const std::pair<const char*, const char*> bad[] = {
      {"", "must have an object"},
      {"{\"r\": 0}", "r must be at least 1"},
      {"{\"r\": 1.5}", "[config] r must be a whole number; got 1.5 in the file"},
      {"{\"use_rslora\": 1}", "use_rslora must be true or false; got 1"},
      {"{\"layers_to_transform\": []}", "layers_to_transform must be layer indices; got []"},
      {"{\"init_lora_weights\": 2}", "init_lora_weights must be true, false or 'gaussian'; got 2"},
      {"{\"r\": 99999999999999999999}", "r must be a whole number; got 9999"},
      {"{\"r\": 2", "must have '}'"},
      {"{\"res_mode\": \"xs\"}", "res_mode must be"},
      {"{\"peft_type\": \"LORA\"}", "peft_type must be 'RESLORA'; got 'LORA' in the file"},
      {"{\"target_modules\": []}", "got an empty list"},
      {"{\"rank_pattern\": [1]}", "rank_pattern must map expressions to whole numbers; got [1]"},
  };
  for (const auto& [text, sentence] : bad)
    EXPECT_TRUE(refuses([&, t = text] { config_from_json(t, "the file"); }, sentence)) << text;
}

}  // namespace
}  // namespace reslora
