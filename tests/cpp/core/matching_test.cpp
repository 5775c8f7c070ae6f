// Names of modules: heads by the ends of their paths, wrappers, and the layers that a file is of.
#include <gtest/gtest.h>
#include <reslora/matching.h>

#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT
using Names = std::vector<std::string>;

/// A list of blocks, each with two layers, and a head.
std::vector<ModuleInfo> modules_with(int64_t depth) {
  const auto linear = [](std::string path) {
    ModuleInfo info;
    info.path = std::move(path);
    info.type = "Linear";
    info.in_features = info.out_features = 4;
    info.is_linear = true;
    return info;
  };
  std::vector<ModuleInfo> modules(2);
  modules[1].path = "layers";
  modules[1].is_uniform = true;
  for (int64_t n = 0; n < depth; ++n) {
    const std::string block = "layers." + std::to_string(n);
    modules.emplace_back().path = block;
    modules.push_back(linear(block + ".q"));
    modules.push_back(linear(block + ".v"));
  }
  modules.push_back(linear("lm_head"));
  return modules;
}

const ResLoraConfig kConfig = ResLoraConfig().r(2).target_modules({"q"});

std::vector<ChainRecord> chains_of(int64_t depth) {
  const std::vector<ModuleInfo> modules = modules_with(depth);
  return find_chains(modules, match_layers(modules, kConfig).layers, kConfig);
}

TEST(SavedPart, IsWhatEndsWithAName) {
  EXPECT_EQ(saved_part("lm_head", {"head"}), "lm_head");
  EXPECT_EQ(saved_part("layers.0.input_norm.weight", {"q", "norm"}), "layers.0.input_norm");
  EXPECT_EQ(saved_part("layers.0.q", {"norm", "layers.1"}), "");
  EXPECT_EQ(saved_part("head", {"lm_head"}), "");
  EXPECT_EQ(saved_part("", {"head"}), "");
  EXPECT_EQ(saved_part("head", {}), "");
}

TEST(PlainName, LeavesWrappersOut) {
  EXPECT_EQ(plain_name("_orig_mod.layers.0._checkpoint_wrapped_module.lin"), "layers.0.lin");
  EXPECT_EQ(plain_name("layers.*._fsdp_wrapped_module.lin"), "layers.*.lin");
  EXPECT_EQ(plain_name("layers.0.lin_orig_mod"), "layers.0.lin_orig_mod");
  EXPECT_EQ(plain_name("_orig_mod"), "");
  EXPECT_EQ(plain_name(""), "");
}

TEST(IsInExperts, ReadsPathsAndTheKeysOfChains) {
  for (const char* path : {"layers.0.mlp.experts.3.w1", "model.layers.*.mlp.experts.0.w1",
                           "block.2.local_experts.7", "experts.expert_0.wi", "experts"})
    EXPECT_TRUE(is_in_experts(path)) << path;
  for (const char* path : {"layers.*.mlp.shared_expert.up", "mlp.shared_experts.0.up",
                           "action_expert.layers.*.q_proj", "expertise.up", "layers.*.gate", ""})
    EXPECT_FALSE(is_in_experts(path)) << path;
}

TEST(IsInLayers, LeavesOutOtherNumbersButNoWholePath) {
  const auto config = ResLoraConfig().target_modules({"q", "lm_head"}).layers_to_transform({1});
  EXPECT_TRUE(is_in_layers(config, "layers.1.q"));
  EXPECT_TRUE(is_in_layers(config, "lm_head"));
  EXPECT_FALSE(is_in_layers(config, "layers.0.q"));
  EXPECT_FALSE(is_in_layers(config, "model.lm_head"));
  EXPECT_TRUE(is_in_layers(ResLoraConfig(), "layers.0.q"));
  EXPECT_EQ(match_layers(modules_with(3), config).layers, (Names{"layers.1.q", "lm_head"}));
  const auto all = ResLoraConfig(config).target_modules("all-linear");
  EXPECT_EQ(match_layers(modules_with(3), all).layers, (Names{"layers.1.q", "layers.1.v"}));
}

TEST(Expressions, AreBoundedInLengthAndDepth) {
  const auto repeated = [](const std::string& part, int count) {
    std::string text;
    for (int i = 0; i < count; ++i) text += part;
    return text;
  };
  const std::vector<std::string> large = {repeated("(", 20000),
                                          repeated("(", 101) + "a" + repeated(")", 101),
                                          repeated("(a*)*", 2000),
                                          "a{9000}",
                                          "(a?){10000}",
                                          "((a{90}){90}){90}",
                                          "(a{2,5000}){3}",
                                          "(a?){99999999999999999999999}",
                                          repeated("(.*)*", 101),
                                          repeated("(?=.*", 3) + "a" + repeated(")", 3),
                                          repeated("(.?)", 201),
                                          repeated("(a|)", 201),
                                          repeated("([)]b", 101) + repeated(")", 101)};
  for (const std::string& text : large)
    EXPECT_TRUE(testing::refuses([&] { matches_ecma_script(text, "a"); }, "got a larger one"));
  EXPECT_TRUE(matches_ecma_script(repeated("(", 90) + "a" + repeated(")", 90), "a"));
  EXPECT_TRUE(matches_ecma_script("[(]{3}[^)(*]*[)*]+", "(((a)*"));
  EXPECT_TRUE(matches_ecma_script(R"(\((\(\(a{2,3}\)\)){1,2}\))", "(((aaa)))"));
  EXPECT_TRUE(matches_ecma_script("(?=.*q_)(?!.*v_)(?=.*p(?!x)).*proj", "layers.0.q_proj"));
}

TEST(Expressions, TakeNoLongerThanTheyAreLong) {
  const std::string text(60, 'a');  // of which backtracking would try 2^60 ways
  EXPECT_FALSE(matches_ecma_script("(a*)*b", text));
  EXPECT_FALSE(matches_ecma_script("(a|a)*b", text));
  EXPECT_FALSE(matches_ecma_script("(.*)*(.*)*(.*)*x", text));
}

TEST(MatchSaved, TakesTheLayersOfTheFile) {
  const auto config = ResLoraConfig(kConfig).target_modules({"q", "nothing"});
  const auto wide = ResLoraConfig(config).layers_to_transform({0, 1, 9}).rank_pattern({{"z", 3}});
  EXPECT_THROW(match_layers(modules_with(2), wide), c10::Error);
  for (const ResLoraConfig& own : {config, wide})
    EXPECT_EQ(match_saved(modules_with(2), own, chains_of(2), {}).layers,
              (Names{"layers.0.q", "layers.1.q"}));
  const auto all = ResLoraConfig(kConfig).target_modules("all-linear");
  EXPECT_EQ(match_saved(modules_with(2), all, chains_of(2), {}).layers.size(), 2U);
}

TEST(MatchSaved, ShowsThatAModelIsAnother) {
  EXPECT_EQ(match_saved(modules_with(3), kConfig, chains_of(2), {}).layers.size(), 3U);
  EXPECT_EQ(match_saved(modules_with(1), kConfig, chains_of(2), {}).layers.size(), 1U);
  const auto some = ResLoraConfig(kConfig).target_modules({"0.q", "1.q"});
  EXPECT_EQ(match_saved(modules_with(3), some, chains_of(2), {}).layers.size(), 2U);
  const auto two = ResLoraConfig(kConfig).layers_to_transform({0, 1});
  EXPECT_EQ(match_saved(modules_with(3), two, chains_of(2), {}).layers.size(), 2U);
  EXPECT_TRUE(refuses([] { match_saved(modules_with(0), kConfig, chains_of(2), {}); },
                      "must be of this model; got layers.0.q, which matches nothing"));
}

TEST(MatchSaved, FindsTheModulesOfOtherTensors) {
  const auto config = ResLoraConfig(kConfig).modules_to_save({"head"});
  const auto saved = [&](const Names& heads) {
    return match_saved(modules_with(1), config, chains_of(1), heads).saved;
  };
  EXPECT_EQ(saved({"lm_head.bias", "lm_head.weight"}), Names{"lm_head"});
  EXPECT_EQ(saved({"embed.weight"}), Names{});
  EXPECT_EQ(saved({"other_head.weight"}), Names{});
}

}  // namespace
}  // namespace reslora
