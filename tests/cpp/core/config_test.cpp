// Options: defaults, their ranges and the sentences that refuse bad ones.
#include <reslora/config.h>

#include <cmath>
#include <limits>

#include "testing.h"

namespace reslora {
namespace {

using testing::refuses;

TEST(Config, DefaultsAreValid) { EXPECT_NO_THROW(validate(ResLoraConfig())); }

TEST(Config, BoundsThatAreAllowed) {
  EXPECT_NO_THROW(validate(ResLoraConfig().r(1).pre_num(-1).norm_window(0).lora_alpha(1e-3)));
  EXPECT_NO_THROW(validate(ResLoraConfig().lora_dropout(0.999).first_block("plain")));
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
        BadConfig{ResLoraConfig().norm_window(-1), "norm_window must be 0"}));

}  // namespace
}  // namespace reslora
