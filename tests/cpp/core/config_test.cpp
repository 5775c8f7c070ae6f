// Options: defaults, their ranges and the sentences that refuse bad ones.
#include <reslora/config.h>
#include <reslora/config_json.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "testing.h"

namespace reslora {
namespace {

using testing::refuses;

TEST(Config, DefaultsAreValid) { EXPECT_NO_THROW(validate(ResLoraConfig())); }

TEST(Config, BoundsThatAreAllowed) {
  EXPECT_NO_THROW(validate(ResLoraConfig().r(1).pre_num(-1).norm_window(0).lora_alpha(1e-3)));
  EXPECT_NO_THROW(validate(ResLoraConfig().lora_dropout(0.999).first_block("plain")));
}

TEST(Config, IndicesGoWithDefaultTargets) {
  EXPECT_NO_THROW(validate(ResLoraConfig().layers_to_transform({0, 2}).layers_pattern({"h"})));
  EXPECT_TRUE(
      refuses([] { validate(ResLoraConfig().layers_to_transform({0}).target_modules(".*q")); },
              "layers_to_transform needs a list of target_modules or 'all-linear'"));
}

TEST(Config, EveryShortcutHasAName) {
  for (const char* name : {"none", "is", "bs", "ms"}) {
    EXPECT_EQ(shortcut_name(parse_shortcut(name)), name);
  }
}

TEST(Config, ScalingIsAlphaOverRankOrItsRoot) {
  EXPECT_DOUBLE_EQ(scaling_of(16, 8, false), 2);
  EXPECT_DOUBLE_EQ(scaling_of(16, 4, true), 8);
  EXPECT_TRUE(refuses([] { scaling_of(16, 0, false); }, "r must be at least 1; got 0"));
}

TEST(Config, ComparisonNamesTheFirstOptionThatDiffers) {
  const ResLoraConfig config;
  EXPECT_EQ(config, ResLoraConfig());
  EXPECT_EQ(first_difference(config, ResLoraConfig()), "");
  EXPECT_EQ(first_difference(config, ResLoraConfig().strict_links(true)), "strict_links");
  EXPECT_EQ(first_difference(config, ResLoraConfig().pre_num(2).r(4)), "r");
  EXPECT_EQ(first_difference(config, ResLoraConfig().target_modules({"q"})), "target_modules");
  EXPECT_NE(ResLoraConfig().rank_pattern({{"a", 1}, {"b", 2}}),
            ResLoraConfig().rank_pattern({{"b", 2}, {"a", 1}}));  // the first that matches counts
  EXPECT_NE(ResLoraConfig().init_lora_weights(false),
            ResLoraConfig().init_lora_weights("gaussian"));
  EXPECT_EQ(ResLoraConfig().other_options({{"x", "1"}, {"y", "2"}}),
            ResLoraConfig().other_options({{"y", "2"}, {"x", "1"}}));
  EXPECT_EQ(first_difference(config, ResLoraConfig().other_options({{"x", "1"}})), "x");
  EXPECT_EQ(first_difference(ResLoraConfig().other_options({{"x", "1"}}), config), "x");
}

TEST(Config, FormulaDiffersWithShortcutReachAndFirstBlockOnly) {
  const ResLoraConfig config;
  EXPECT_EQ(formula_difference(config, ResLoraConfig().r(2).lora_alpha(1).merge_method("lsq")), "");
  EXPECT_EQ(formula_difference(config, ResLoraConfig().r(2).res_mode("ms")), "res_mode");
  EXPECT_EQ(formula_difference(config, ResLoraConfig().pre_num(2)), "pre_num");
  EXPECT_EQ(formula_difference(config, ResLoraConfig().first_block("plain")), "first_block");
}

TEST(Config, EveryOptionIsListedWithItsDefault) {
  std::map<std::string, std::string> defaults;
  for (const OptionInfo& option : options()) {
    defaults[option.name] = option.default_json;
    EXPECT_EQ(option_json(ResLoraConfig(), option.name), option.default_json);
  }
  EXPECT_EQ(defaults.size(), 19U);
  EXPECT_EQ(defaults.at("r"), "8");
  EXPECT_EQ(defaults.at("res_mode"), "\"is\"");
  EXPECT_EQ(defaults.at("merge_method"), "null");
  EXPECT_TRUE(refuses([] { option_json(ResLoraConfig(), "x"); }, "there is no option 'x'"));
}

struct BadConfig {
  ResLoraConfig config;
  std::string sentence;
};

class BadOption : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadOption, IsRefusedInOneSentence) {
  EXPECT_TRUE(refuses([] { validate(GetParam().config); }, GetParam().sentence));
}

const double kInfinity = std::numeric_limits<double>::infinity();

INSTANTIATE_TEST_SUITE_P(
    Config, BadOption,
    ::testing::Values(
        BadConfig{ResLoraConfig().r(0), "r must be at least 1; got 0"},
        BadConfig{ResLoraConfig().lora_alpha(0), "lora_alpha must be finite and greater than 0"},
        BadConfig{ResLoraConfig().lora_alpha(kInfinity), "lora_alpha must be finite"},
        BadConfig{ResLoraConfig().lora_alpha(std::nan("")), "lora_alpha must be finite"},
        BadConfig{ResLoraConfig().lora_dropout(1), "lora_dropout must lie in [0, 1); got 1"},
        BadConfig{ResLoraConfig().lora_dropout(-0.1), "lora_dropout must lie in [0, 1); got -0.1"},
        BadConfig{ResLoraConfig().lora_dropout(std::nan("")), "lora_dropout must lie in [0, 1)"},
        BadConfig{ResLoraConfig().res_mode("xs"), "'none', 'is', 'bs' or 'ms'; got 'xs'"},
        BadConfig{ResLoraConfig().pre_num(-2), "pre_num must be -1"},
        BadConfig{ResLoraConfig().first_block("twice"), "'double' or 'plain'; got 'twice'"},
        BadConfig{ResLoraConfig().norm_window(-1), "norm_window must be 0"},
        BadConfig{ResLoraConfig().norm_window(int64_t{1} << 45), "at most 131072; got 35184"}));

}  // namespace
}  // namespace reslora
