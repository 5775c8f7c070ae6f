// Where a saved adapter's layers and heads are found among the tensors of a base's files.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <reslora/adapted_files.h>
#include <reslora/config_json.h>

#include <cmath>

#include "io/in_folder.h"
#include "testing.h"

namespace reslora {
namespace {

using at::Tensor;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Key;
using testing::random;
using testing::refuses;
using testing::Warnings;

constexpr int64_t kIn = 6, kOut = 4;

class AdaptedFilesTest : public testing::InFolder {
 protected:
  ModelFiles files_of(const std::map<std::string, Tensor>& tensors) const {
    save_tensors(folder_ + "/base", {tensors, {}});
    return ModelFiles({folder_ + "/base"});
  }
};

/// Two layers of one chain, `more` beside the options in its JSON.
AdapterFile adapter_of(const ResLoraConfig& config = ResLoraConfig().r(2).res_mode("none"),
                       const std::string& more = "") {
  AdapterFile adapter;
  adapter.config_json = config_to_json(ResLoraConfig(config).r(2).lora_alpha(1));
  adapter.config_json.insert(1, more);
  ChainRecord& chain = adapter.chains.emplace_back();
  chain.name = "m.*.q";
  for (const char* name : {"m.0.q", "m.1.q"}) {
    chain.layers.push_back({name, kIn, kOut, 2, 0.5});
    adapter.tensors[std::string(name) + ".reslora_A.weight"] = random({2, kIn}, 1);
    adapter.tensors[std::string(name) + ".reslora_B.weight"] = random({kOut, 2}, 2);
  }
  return adapter;
}

std::map<std::string, Tensor> base_of(const std::string& prefix = "m.",
                                      bool is_transposed = false) {
  const std::vector<int64_t> sizes =
      is_transposed ? std::vector<int64_t>{kIn, kOut} : std::vector<int64_t>{kOut, kIn};
  return {{prefix + "0.q.weight", random(sizes, 3).to(at::kFloat)},
          {prefix + "1.q.weight", random(sizes, 4).to(at::kFloat)},
          {prefix + "1.q.bias", random({kOut}, 5).to(at::kFloat)},
          {"other.weight", at::ones({2})}};
}

TEST_F(AdaptedFilesTest, LayersAreFoundUnderAnyPrefix) {
  for (const std::string prefix : {"m.", "outer.m.", ""}) {
    const AdaptedFiles adapted(files_of(base_of(prefix)), adapter_of());
    const auto edits = adapted.edits(adapted.plan({}, ""));
    EXPECT_THAT(edits, ElementsAre(Key(prefix + "0.q.weight"), Key(prefix + "1.q.weight")));
    EXPECT_EQ(edits.begin()->second.layer->name, "m.0.q");
  }
  auto twice = base_of("a.m.");
  twice.merge(base_of("b.m."));
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(twice), adapter_of()); },
                      "weight of every adapted layer; got none for m.0.q among 7 tensors"));
}

TEST_F(AdaptedFilesTest, LayersHaveTensorsOfTheirOwn) {
  AdapterFile adapter = adapter_of();
  adapter.chains[0].layers[1].name = "outer.m.0.q";  // one of two stacks of the same names
  for (const std::string end : {".reslora_A.weight", ".reslora_B.weight"})
    adapter.tensors["outer.m.0.q" + end] = adapter.tensors.at("m.1.q" + end);
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base_of()), adapter); },
                      "a tensor of its own; got m.0.q.weight for outer.m.0.q and another"));
}

TEST_F(AdaptedFilesTest, TheBiasOfAnAffineFitIsRefusedByABaseWithoutOne) {
  const AdapterFile adapter = adapter_of(ResLoraConfig().r(2).res_mode("is"));
  std::map<std::string, LayerStatistics> statistics;
  Fit& fit = statistics["m.1.q"].fit;
  fit.A = fit.affine_A = random({2, kIn}, 6);
  fit.offset = random({2}, 7);
  auto base = base_of();
  const AdaptedFiles adapted(files_of(base), adapter);
  const MergePlan plan = adapted.plan(statistics, "lsq");
  EXPECT_EQ(adapted.edits(plan).count("m.1.q.bias"), 1U);
  base.erase("m.1.q.bias");
  const AdaptedFiles other(files_of(base), adapter);
  EXPECT_TRUE(refuses([&] { other.edits(plan); },
                      "every bias that an affine fit moves; got none for layer m.1.q"));
  EXPECT_EQ(other.edits(other.plan(statistics, "lsq")).size(), 2U);
}

TEST_F(AdaptedFilesTest, TransposedChainsAreReadAndEditedAsTheyLie) {
  const AdapterFile adapter =
      adapter_of(ResLoraConfig().r(2).res_mode("none"), "\"fan_in_fan_out\": [\"m.*.q\"],");
  EXPECT_THAT(transposed_chains(adapter), ElementsAre("m.*.q"));
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base_of()), adapter); },
                      "got [4, 6] for m.0.q.weight, where layer m.0.q is 6 -> 4"));
  const ModelFiles files = files_of(base_of("m.", true));
  const AdaptedFiles adapted(files, adapter);
  const MergePlan plan = adapted.plan({}, "");
  const auto edits = adapted.edits(plan);
  files.write(folder_ + "/merged", files.names(), edits, {});
  const Tensor before = files.tensor("m.1.q.weight");
  const Tensor after = load_tensors(folder_ + "/merged").tensors.at("m.1.q.weight");
  const LayerMerge& layer = plan.layers()[1];
  EXPECT_TRUE(
      at::allclose(after, before + at::mm(layer.B, layer.A).t().to(at::kFloat), 1e-5, 1e-6));
  EXPECT_TRUE(transposed_chains(adapter_of()).empty());
  for (const char* value : {"5", "true", "[1]"}) {
    const AdapterFile bad = adapter_of(ResLoraConfig().r(2).res_mode("none"),
                                       std::string("\"fan_in_fan_out\": ") + value + ",");
    EXPECT_TRUE(refuses([&] { transposed_chains(bad); }, "must list the chains whose files hold"));
  }
}

TEST_F(AdaptedFilesTest, ALayerAtSeveralPlacesIsMergedAtEachAndNotExported) {
  const auto options = ResLoraConfig().r(2).res_mode("none");
  const AdapterFile adapter =
      adapter_of(options, R"("other_places": {"m.0.q": ["head.q", "gone.q"]},)");
  EXPECT_THAT(other_places(adapter).at("m.0.q"), ElementsAre("head.q", "gone.q"));
  EXPECT_TRUE(refuses([&] { plan_adapter(adapter, {}, ""); }, "got m.0.q, which hangs at head.q"));
  auto base = base_of();
  base["head.q.weight"] = base["m.0.q.weight"].clone();
  const auto check = [&](const std::vector<std::string>& places) {
    const ModelFiles files = files_of(base);
    const AdaptedFiles adapted(files, adapter);
    const MergePlan plan = adapted.plan({}, "");
    files.write(folder_ + "/merged", files.names(), adapted.edits(plan), {});
    const auto merged = load_tensors(folder_ + "/merged").tensors;
    const LayerMerge& layer = plan.layers()[0];
    const Tensor delta = at::mm(layer.B, layer.A).to(at::kFloat);
    for (const std::string& place : places)
      EXPECT_TRUE(at::allclose(merged.at(place), base.at(place) + delta, 1e-5, 1e-6)) << place;
  };
  check({"m.0.q.weight", "head.q.weight"});
  base["head.q.weight"] += 1;
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base), adapter); },
                      "must have one weight there; got another in head.q.weight"));
  base.erase("m.0.q.weight");  // of tensors that are one, files may hold any
  check({"head.q.weight"});
}

TEST_F(AdaptedFilesTest, ACopyBesideTheModelIsNoPlaceOfALayer) {
  const AdapterFile adapter = adapter_of(ResLoraConfig().r(2).res_mode("none"),
                                         R"("other_places": {"m.0.q": ["head.q"]},)");
  auto base = base_of();
  base["head.q.weight"] = base["ema.m.0.q.weight"] = base["m.0.q.weight"].clone();
  base.erase("m.0.q.weight");
  const AdaptedFiles adapted(files_of(base), adapter);
  EXPECT_THAT(adapted.edits(adapted.plan({}, "")),
              ElementsAre(Key("head.q.weight"), Key("m.1.q.weight")));
}

TEST_F(AdaptedFilesTest, AWeightThatIsAnotherModulesTooIsRefused) {
  const AdapterFile adapter = adapter_of(ResLoraConfig().r(2).res_mode("none"),
                                         R"("tied_weights": {"m.0.q": ["other.q.weight"]},)");
  const AdaptedFiles adapted(files_of(base_of()), adapter);
  const MergePlan plan = adapted.plan({}, "");
  EXPECT_TRUE(refuses([&] { adapted.edits(plan); },
                      "got those of m.0.q, where other.q.weight is the same tensor"));
  EXPECT_EQ(plan_adapter(adapter, {}, "").layers().size(), 2U);
}

TEST_F(AdaptedFilesTest, AnotherBaseIsRefused) {
  auto base = base_of();
  base["m.1.q.weight"] = at::ones({kOut, kIn + 1});
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base), adapter_of()); },
                      "got [4, 7] for m.1.q.weight, where layer m.1.q is 6 -> 4"));
  base["m.1.q.weight"] = at::ones({kOut, kIn}, at::kChar);
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base), adapter_of()); }, "unquantised files"));
  base["m.1.q.weight"] = at::ones({kOut, kIn}).to(at::kFloat8_e4m3fn);
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base), adapter_of()); }, "unquantised files"));
  AdapterFile adapter = adapter_of();
  adapter.tensors["m.0.q.reslora_B.weight"][0][0] = NAN;
  EXPECT_TRUE(refuses([&] { AdaptedFiles(files_of(base_of()), adapter).plan({}, ""); },
                      "must be finite; got NaN or infinity in layer m.0.q"));
  EXPECT_TRUE(refuses([&] { plan_adapter(adapter, {}, ""); }, "must be finite"));
}

TEST_F(AdaptedFilesTest, MoreLayersOfAChainAreRefusedWhereAllAreMeant) {
  auto base = base_of();
  base["m.2.q.weight"] = base["m.10.q.weight"] = at::ones({kOut, kIn});
  base["m.x.q.weight"] = base["m.3.q.bias"] = at::ones({2});
  const ModelFiles files = files_of(base);
  const auto config = [] { return ResLoraConfig().r(2).res_mode("none"); };
  const auto meets = [&](const ResLoraConfig& own, const ExpressionMatch& match) {
    AdaptedFiles(files, adapter_of(own), match);
  };
  for (const ModuleNames& all :
       {ModuleNames({"q"}), ModuleNames("all-linear"), ModuleNames("m.+q")})
    EXPECT_TRUE(refuses([&] { meets(config().target_modules(all), matches_ecma_script); },
                        "got 4 layers m.*.q, of which the adapter has 2"));
  EXPECT_NO_THROW(meets(config().target_modules("m\\.[01]\\.q"), matches_ecma_script));
  EXPECT_NO_THROW(
      meets(config().target_modules({"q"}).layers_to_transform({0, 1}), matches_ecma_script));
  EXPECT_NO_THROW(meets(config().exclude_modules({"m.2.q"}), matches_ecma_script));
  const ExpressionMatch own = [](const std::string&, const std::string& path) {
    return path == "m.0.q" || path == "m.1.q";
  };
  EXPECT_NO_THROW(meets(config().target_modules("another dialect"), own));
}

TEST_F(AdaptedFilesTest, HeadsTakeTheDtypeOfWhatTheyReplace) {
  AdapterFile adapter = adapter_of();
  adapter.tensors["m.head.weight"] = random({3, kOut}, 6);
  adapter.tensors["m.new.weight"] = random({3}, 7);
  adapter.tensors["m.count"] = at::ones({2}, at::kLong);
  auto base = base_of("");
  base["head.weight"] = at::ones({3, kOut}, at::kBFloat16);
  const AdaptedFiles adapted(files_of(base), adapter);
  const auto edits = adapted.edits(adapted.plan({}, ""));
  EXPECT_TRUE(at::equal(*edits.at("head.weight").replacement,
                        adapter.tensors["m.head.weight"].to(at::kBFloat16)));
  EXPECT_EQ(edits.at("m.new.weight").replacement->scalar_type(), at::kFloat);
  EXPECT_EQ(edits.at("m.count").replacement->scalar_type(), at::kLong);
  base["head.weight"] = at::ones({2, kOut});
  const Warnings warnings;
  const AdaptedFiles other(files_of(base), adapter);
  other.edits(other.plan({}, ""));
  ASSERT_EQ(warnings.all.size(), 1U);
  EXPECT_THAT(warnings.all[0], HasSubstr("head.weight is [3, 4] in the adapter, [2, 4] in the"));
}

TEST_F(AdaptedFilesTest, TiedAndResizedEmbeddingsAreRefused) {
  AdapterFile adapter = adapter_of();
  adapter.tensors["lm_head.weight"] = random({5, kOut}, 8);
  auto base = base_of();
  base["m.embed_tokens.weight"] = at::ones({5, kOut});
  const auto edits_of = [&](bool ties_embeddings) {
    const AdaptedFiles adapted(files_of(base), adapter);
    return adapted.edits(adapted.plan({}, ""), ties_embeddings);
  };
  EXPECT_TRUE(refuses([&] { edits_of(false); }, "lm_head.weight, tied to m.embed_tokens.weight"));
  base["lm_head.weight"] = at::ones({5, kOut});
  EXPECT_EQ(edits_of(true).count("lm_head.weight"), 1U);
  adapter.tensors["m.embed_tokens.weight"] = random({5, kOut}, 9);
  EXPECT_NO_THROW(edits_of(false));
  EXPECT_TRUE(refuses([&] { edits_of(true); }, "m.embed_tokens.weight, tied to the output head"));
  base["m.embed_tokens.weight"] = at::ones({4, kOut});
  EXPECT_TRUE(refuses([&] { edits_of(false); },
                      "got m.embed_tokens.weight [5, 4] in the adapter, [4, 4] in the base"));
}

TEST_F(AdaptedFilesTest, EmbeddingsThatWereResizedTogetherAreWrittenOnce) {
  AdapterFile adapter = adapter_of();
  adapter.tensors["lm_head.weight"] = random({5, kOut}, 8).to(at::kFloat);
  adapter.tensors["m.embed_tokens.weight"] = adapter.tensors["lm_head.weight"].clone();
  auto base = base_of();
  base["m.embed_tokens.weight"] = at::ones({5, kOut});
  const AdaptedFiles adapted(files_of(base), adapter);
  const auto edits = adapted.edits(adapted.plan({}, ""), /*ties_embeddings=*/true);
  EXPECT_EQ(edits.count("lm_head.weight"), 0U);
  EXPECT_TRUE(
      at::equal(*edits.at("m.embed_tokens.weight").replacement, adapter.tensors["lm_head.weight"]));
}

TEST_F(AdaptedFilesTest, TheBaseWeightOfAnAdaptedLayerMustBeThatOfTheFiles) {
  AdapterFile adapter = adapter_of();
  const auto base = base_of();
  const AdaptedFiles plain(files_of(base), adapter);
  const auto wanted = plain.edits(plain.plan({}, ""));
  adapter.tensors["m.1.q.base_layer.weight"] = base.at("m.1.q.weight").clone();
  adapter.tensors["m.1.q.base_layer.bias"] = base.at("m.1.q.bias").clone();
  const AdaptedFiles adapted(files_of(base), adapter);
  EXPECT_EQ(adapted.edits(adapted.plan({}, "")).size(), wanted.size());
  for (const std::string name : {"weight", "bias"}) {
    AdapterFile changed = adapter;
    changed.tensors["m.1.q.base_layer." + name] = base.at("m.1.q." + name) + 1;
    const AdaptedFiles other(files_of(base), changed);
    EXPECT_TRUE(refuses([&] { other.edits(other.plan({}, "")); },
                        "the adapter was trained beside; got others for m.1.q"));
  }
}

}  // namespace
}  // namespace reslora
