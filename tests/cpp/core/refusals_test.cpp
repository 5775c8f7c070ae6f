// What the public calls of options, names, chains, norms and formulas refuse.
#include "refusals.h"

#include <reslora/chain.h>
#include <reslora/config_json.h>
#include <reslora/formulas.h>
#include <reslora/initial_factors.h>
#include <reslora/matching.h>
#include <reslora/merge_rule.h>
#include <reslora/norm_window.h>

namespace reslora {
namespace {

using testing::refuse_nothing;
using testing::refuses_call;
using testing::refuses_positions;
using testing::refuses_tensors;
using testing::Wrong;

TEST(CoreRefusals, Chains) {
  const Chain chain(ResLoraConfig().res_mode("ms"), {{"a", 4, 4, 2, 1}, {"b", 4, 4, 2, 1}});
  for (const char* mode : {"none", "is", "bs", "ms"}) {
    const Chain own(ResLoraConfig().res_mode(mode), {{"a", 4, 4, 2, 1}, {"b", 4, 4, 2, 1}});
    refuses_positions("Chain::layer", "n", 2, [&](int64_t n) { own.layer(n); });
    refuses_positions("Chain::wiring", "n", 2, [&](int64_t n) { own.wiring(n); });
    refuses_positions("Chain::is_linked", "n", 2, [&](int64_t n) { own.is_linked(n); });
    refuses_positions("Chain::reached", "n", 2, [&](int64_t n) { own.reached(n); });
    refuses_positions("Chain::merges_exactly", "n", 2, [&](int64_t n) { own.merges_exactly(n); });
  }
  const auto made = [](const LayerShape& shape) {
    return [=] { Chain(ResLoraConfig(), {shape}); };
  };
  refuses_positions("Chain::leave_out", "n", 2, [&](int64_t n) { Chain(chain).leave_out(n, {}); });
  for (const int64_t other : {-1, 1, 2})
    refuses_call(
        "Chain::leave_out", "others",
        [&] {
          Chain own = chain;
          own.leave_out(1, {other});
        },
        "must name positions before");
  refuses_call("Chain::Chain", "left_out", made({"a", 4, 4, 2, 1, {0}}), "must name positions");
  refuses_call("Chain::Chain", "in_features", made({"a", -1, 4, 2, 1}), "must not be negative");
  refuses_call("Chain::Chain", "out_features", made({"a", 4, -1, 2, 1}), "must not be negative");
  refuses_call("Chain::Chain", "r", made({"a", 4, 4, 0, 1}), "r must be at least 1");
  refuses_call("Chain::Chain", "scaling", made({"a", 4, 4, 2, NAN}), "scaling must be finite");
  refuses_call(
      "Chain::Chain", "config", [] { Chain(ResLoraConfig().pre_num(-2), {}); }, "pre_num");
  refuses_call(
      "check_chains", "another chain", [&] { check_chains({record_of("c", chain)}, {}); },
      "must be of this model");
  refuse_nothing({"Chain::size", "Chain::shortcut", "Chain::config", "record_of", "shown",
                  "operator==", "operator!="});
}

TEST(CoreRefusals, Options) {
  refuses_call(
      "validate", "a value", [] { validate(ResLoraConfig().r(0)); }, "r must be");
  refuses_call(
      "validate", "no match", [] { validate(ResLoraConfig().target_modules("a.*"), nullptr); },
      "got none");
  refuses_call(
      "parse_shortcut", "a name", [] { parse_shortcut("IS"); }, "res_mode must be");
  refuses_call(
      "shortcut_name", "a value", [] { shortcut_name(static_cast<Shortcut>(9)); }, "got 9");
  refuses_call(
      "scaling_of", "r", [] { scaling_of(8, 0, false); }, "r must be at least 1");
  refuses_call(
      "scaling_of", "lora_alpha", [] { scaling_of(NAN, 8, false); }, "must be finite");
  refuses_call(
      "lora_alpha_of", "r", [] { lora_alpha_of(1, 0, true); }, "r must be at least 1");
  refuses_call(
      "config_to_json", "text", [] { config_to_json(ResLoraConfig().merge_method("\xff")); },
      "[config]");
  refuses_call(
      "config_from_json", "text", [] { config_from_json("{"); }, "[config]");
  refuses_call(
      "option_json", "name", [] { option_json(ResLoraConfig(), "rank"); }, "rank");
  refuses_call(
      "parse_merge_rule", "name", [] { parse_merge_rule("best"); }, "merge_method must be");
  refuses_call(
      "merge_rule_name", "value", [] { merge_rule_name(static_cast<MergeRule>(99)); }, "got 99");
  refuse_nothing(
      {"first_difference", "formula_difference", "shortcut_names", "options", "merge_methods"});
}

TEST(CoreRefusals, Names) {
  const ModuleNames bad("("), good(".*q");
  const auto is_bad = "must be a regular expression";
  refuses_call(
      "matches_ecma_script", "pattern", [] { matches_ecma_script("(", "q"); }, is_bad);
  refuses_call(
      "ModuleNames::matches", "pattern", [&] { bad.matches("q"); }, is_bad);
  refuses_call(
      "ModuleNames::matches", "no match", [&] { good.matches("q", nullptr); }, "got none");
  refuses_call(
      "matches_pattern", "pattern", [] { matches_pattern("q", "("); }, is_bad);
  refuses_call(
      "matches_pattern", "no match", [] { matches_pattern("q", "q", nullptr); }, "none");
  refuse_nothing({"ModuleNames::ModuleNames", "ModuleNames::is_given", "ModuleNames::is_list",
                  "ModuleNames::is_all_linear", "ModuleNames::names", "ModuleNames::expression",
                  "ModuleNames::shown", "ModuleNames::operator==", "is_or_ends_with"});
}

TEST(CoreRefusals, Matching) {
  const std::vector<ModuleInfo> modules = {{"", "Net"}, {"layers.0.q", "Linear", 4, 4, true}};
  const ResLoraConfig config = ResLoraConfig().target_modules({"q"});
  const ResLoraConfig bad = ResLoraConfig().rank_pattern({{"(", 2}});
  refuses_call(
      "default_targets", "other names", [&] { default_targets(modules); }, "must be given");
  refuses_call(
      "default_targets", "no modules", [] { default_targets({}); }, "must be given");
  refuses_call(
      "match_layers", "no modules", [&] { match_layers({}, config); }, "must match");
  refuses_call(
      "match_layers", "another name",
      [&] { match_layers(modules, ResLoraConfig().target_modules({"k"})); }, "'k'");
  refuses_call(
      "match_layers", "no match",
      [&] { match_layers(modules, ResLoraConfig().target_modules("q.*"), nullptr); }, "got none");
  refuses_call(
      "match_saved", "no modules", [&] { match_saved({}, config, {}, {}); }, "of this model");
  refuses_call(
      "match_saved", "another layer",
      [&] {
        match_saved(modules, config, {{"k", {{"layers.1.k", 4, 4, 2, 1}}}}, {});
      },
      "got layers.1.k");
  refuse_nothing({"is_in_experts", "is_in_layers", "plain_name", "saved_part"});
  refuses_call(
      "find_chains", "another layer", [&] { find_chains(modules, {"layers.1.q"}, config); },
      "got 'layers.1.q'");
  refuses_call(
      "rank_of", "pattern", [&] { rank_of(bad, "layers.0.q"); }, "regular expression");
  refuses_call(
      "rank_and_scaling", "pattern", [&] { rank_and_scaling(bad, "q"); }, "regular");
  refuses_call(
      "rank_and_scaling", "r", [] { rank_and_scaling(ResLoraConfig().r(0), "q"); }, "r must");
  refuses_call(
      "warning_without_links", "null", [] { warning_without_links({nullptr}); }, "null");
}

TEST(CoreRefusals, Factors) {
  const at::Tensor A = at::zeros({2, 4}), B = at::zeros({4, 2});
  // Tensors of another width are other layers; on meta there is nothing to fill.
  refuses_tensors("fill_factors", "A", A, [&](const at::Tensor& A) { fill_factors(A, B, true); },
                  {Wrong::kColumns, Wrong::kMeta});
  refuses_tensors("fill_factors", "B", B, [&](const at::Tensor& B) { fill_factors(A, B, true); },
                  {Wrong::kMeta});
  refuses_call(
      "fill_factors", "how", [&] { fill_factors(A, B, std::string("zero")); }, "got 'zero'");
}

TEST(CoreRefusals, Norms) {
  const at::Tensor norms = at::rand({2, 3}), count = at::full({1}, 2, at::kLong);
  refuses_tensors("NormWindow::NormWindow", "norms", norms,
                  [&](const at::Tensor& norms) { NormWindow(norms, count); }, {Wrong::kColumns});
  refuses_tensors("NormWindow::NormWindow", "count", count,
                  [&](const at::Tensor& count) { NormWindow(norms, count); });
  refuses_call(
      "NormWindow::NormWindow", "size", [] { NormWindow(0, at::kCPU); }, "at least 1");
  for (const int64_t size : {int64_t{1} << 45, std::numeric_limits<int64_t>::max()})
    refuses_call(
        "NormWindow::NormWindow", "a large size", [=] { NormWindow(size, at::kCPU); },
        "at most 131072; got " + std::to_string(size));
  refuses_call(
      "NormWindow::NormWindow", "negative count", [&] { NormWindow(norms, count - 3); },
      "must not be negative; got -1");
  const at::Tensor products = at::rand({4, 4});
  refuses_tensors("NormWindow::NormWindow", "products", products,
                  [&](const at::Tensor& own) { NormWindow(norms, count, own); },
                  {Wrong::kUndefined});
  const at::Tensor on_meta = count.to(at::kMeta);
  const NormWindow meta(norms.to(at::kMeta), on_meta, products.to(at::kMeta));
  const NormWindow window(norms, count);
  refuses_call(
      "NormWindow::has_products", "on meta", [&] { meta.has_products(); }, "must have values");
  refuses_call(
      "NormWindow::filled", "on meta", [&] { meta.filled(); }, "must have values");
  refuses_call(
      "NormWindow::in_order", "on meta", [&] { meta.in_order(); }, "must have values");
  refuses_call(
      "NormWindow::mean", "on meta", [&] { meta.mean(Norm::kInput); }, "must have values");
  refuses_call(
      "NormWindow::mean", "which", [&] { window.mean(static_cast<Norm>(2)); }, "got 2");
  refuses_tensors("set_to_mean_of_ranks", "norms", norms,
                  [&](const at::Tensor& own) { set_to_mean_of_ranks(own, norms, 1); });
  refuses_tensors("set_to_mean_of_ranks", "squares", norms.square(),
                  [&](const at::Tensor& squares) { set_to_mean_of_ranks(norms, squares, 1); });
  refuses_call(
      "set_to_mean_of_ranks", "ranks", [&] { set_to_mean_of_ranks(norms, norms, 0); }, "of 0");
  refuse_nothing(
      {"NormWindow::is_defined", "NormWindow::norms", "NormWindow::count", "NormWindow::products"});
}

/// Rows for a formula of one block: `call` gets a block of which one tensor is wrong.
void of_block(const char* function, const std::function<void(const formulas::Block&)>& call) {
  const formulas::Block good = testing::random_blocks({1, 4, 5, 2})[0];
  const auto with = [&](at::Tensor formulas::Block::*member) {
    return [&call, good, member](const at::Tensor& tensor) {
      formulas::Block block = good;
      block.*member = tensor;
      call(block);
    };
  };
  refuses_tensors(function, "W", good.W, with(&formulas::Block::W));
  refuses_tensors(function, "bias", good.bias, with(&formulas::Block::bias), {Wrong::kUndefined});
  refuses_tensors(function, "A", good.A, with(&formulas::Block::A));
  refuses_tensors(function, "B", good.B, with(&formulas::Block::B));
}

TEST(CoreRefusals, FormulasOfForwards) {
  using namespace formulas;
  const std::vector<Block> blocks = testing::random_blocks({2, 4, 4, 2});
  const at::Tensor x = testing::random({3, 4}, 1);
  const std::set<Wrong> rows = {Wrong::kDims};
  of_block("forward_none", [&](const Block& block) { forward_none(block, x); });
  of_block("forward_is", [&](const Block& block) { forward_is(block, x, x); });
  of_block("forward_bs", [&](const Block& block) { forward_bs({block}, 0, 1, x); });
  of_block("forward_ms", [&](const Block& block) { forward_ms({block}, 0, 1, {x}); });
  refuses_tensors(
      "forward_none", "x", x, [&](const auto& x) { forward_none(blocks[0], x); }, rows);
  refuses_tensors(
      "forward_is", "x", x, [&](const auto& x) { forward_is(blocks[0], x, x); }, rows);
  refuses_tensors("forward_is", "x_previous", x,
                  [&](const auto& other) { forward_is(blocks[0], x, other); }, {Wrong::kUndefined});
  refuses_tensors(
      "forward_bs", "x", x, [&](const auto& x) { forward_bs(blocks, 1, 1, x); }, rows);
  refuses_tensors("forward_ms", "xs", x, [&](const auto& x0) {
    forward_ms(blocks, 1, 1, {x0, x});
  });
  refuses_positions("forward_bs", "n", 2, [&](int64_t n) { forward_bs(blocks, n, 1, x); });
  refuses_positions("forward_ms", "n", 2, [&](int64_t n) { forward_ms(blocks, n, 1, {x, x}); });
  refuses_call(
      "forward_bs", "m", [&] { forward_bs(blocks, 1, -2, x); }, "m must be");
  refuses_call(
      "forward_ms", "xs", [&] { forward_ms(blocks, 1, 1, {x}); }, "got 1 tensors");
  const std::vector<Block> other_r = {testing::random_blocks({1, 4, 4, 3})[0], blocks[1]};
  refuses_call(
      "forward_ms", "r",
      [&] {
        forward_ms(other_r, 1, 1, {x, x});
      },
      "one r");
}

TEST(CoreRefusals, FormulasOfMerges) {
  using namespace formulas;
  const std::vector<Block> blocks = testing::random_blocks({2, 4, 4, 2});
  of_block("merged_none", [](const Block& block) { merged_none(block); });
  of_block("merged_is", [](const Block& block) { merged_is(block, 1); });
  of_block("merged_bs", [](const Block& block) { merged_bs({block}, 0, 1); });
  of_block("merged_ms_input", [](const Block& block) { merged_ms_input(block, {1}); });
  of_block("merged_ms_weight", [](const Block& block) { merged_ms_weight({block}, 0, {}); });
  refuses_positions("merged_bs", "n", 2, [&](int64_t n) { merged_bs(blocks, n, 1); });
  refuses_positions("merged_ms_weight", "n", 2,
                    [&](int64_t n) { merged_ms_weight(blocks, n, {}); });
  const std::vector<Block> other_in = {testing::random_blocks({1, 5, 4, 2})[0], blocks[1]};
  refuses_call(
      "merged_bs", "features", [&] { merged_bs(other_in, 1, 1); }, "the same features");
  refuses_call(
      "merged_ms_weight", "features", [&] { merged_ms_weight(other_in, 1, {1}); }, "one shape");
  refuses_call(
      "merged_ms_weight", "alpha_star", [&] { merged_ms_weight(blocks, 0, {1}); }, "at most");
  refuses_call(
      "alpha_star_input", "own", [] { alpha_star_input(1, 0); }, "greater than 0");
  refuses_call(
      "alpha_star_input", "previous", [] { alpha_star_input(NAN, 1); }, "must be finite");
  refuses_call(
      "alpha_star_weight", "k", [] { alpha_star_weight({1}, 1, 0); }, "k must lie");
  refuses_call(
      "alpha_star_weight", "norms", [] { alpha_star_weight({}, 1, 1); }, "got 0");
}

}  // namespace
}  // namespace reslora
