// The rules for names: which layers a config means, what is left out, and which chains they form.
#include <reslora/matching.h>

#include <algorithm>
#include <array>
#include <set>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "core/experts.h"

namespace reslora {
namespace {

using Names = std::vector<std::string>;
using Modules = std::vector<ModuleInfo>;
using Found = std::vector<const ModuleInfo*>;

/// The first of these that a model has are its default targets.
const std::array<Names, 10> kDefaultTargets = {{
    {"q_proj", "v_proj"},  // Llama, Mistral, Qwen, Gemma, Phi, OPT, BART, Whisper, CLIP, ViT
    {"query", "value"},    // BERT, RoBERTa, and ViT of older versions
    {"query_proj", "value_proj"},  // DeBERTa
    {"q", "v"},                    // T5
    {"q_lin", "v_lin"},            // DistilBERT
    {"c_attn"},                    // GPT-2
    {"query_key_value"},           // GPT-NeoX, BLOOM, Falcon
    {"qkv_proj"},                  // Phi-3
    {"Wqkv"},                      // ModernBERT
    {"to_q", "to_v"},              // diffusers
}};
constexpr size_t kNamesInErrors = 12;

bool contains(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Names parts_of(const std::string& path) {
  Names parts;
  std::stringstream stream(path);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

std::string joined(const Names& parts, size_t count) {
  return fmt::format("{}", fmt::join(parts.begin(), parts.begin() + count, "."));
}

std::string last_part(const std::string& path) { return path.substr(path.rfind('.') + 1); }

bool is_number(const std::string& part) {
  return !part.empty() && part.size() < 19 &&
         part.find_first_not_of("0123456789") == std::string::npos;
}

/// The kinds of linear layers that could be meant, for an error.
std::string candidates(const Modules& modules) {
  Names kinds;
  for (const ModuleInfo& module : modules)
    if (module.is_linear && !contains(kinds, last_part(module.path)))
      kinds.push_back(last_part(module.path));
  if (kinds.size() > kNamesInErrors) kinds.resize(kNamesInErrors);
  return kinds.empty() ? "no linear layer at all" : fmt::format("{}", fmt::join(kinds, ", "));
}

/// True where `path` is, or lies inside, a module that one of `names` means.
bool is_under(const Names& names, const std::string& path) {
  if (names.empty()) return false;
  const Names parts = parts_of(path);
  for (size_t count = 1; count <= parts.size(); ++count)
    for (const std::string& name : names)
      if (is_or_ends_with(joined(parts, count), name)) return true;
  return false;
}

/// The number of a path that counts as its layer's, -1 where there is none.
int64_t layer_index(const ResLoraConfig& config, const std::string& path) {
  const Names parts = parts_of(path);
  const Names& before = config.layers_pattern();
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool counts = before.empty() || (i > 0 && contains(before, parts[i - 1]));
    if (counts && is_number(parts[i])) return std::stoll(parts[i]);
  }
  return -1;
}

// ---- Targets -----------------------------------------------------------------------------------

/// Every linear layer but output heads, experts, and layers that are never called.
Found all_linear(const Modules& modules, Names& warnings) {
  Found found;
  Names left_out;
  for (const ModuleInfo& module : modules) {
    if (!module.is_linear || module.path.empty() || module.is_head ||
        last_part(module.path) == "lm_head")
      continue;
    if (detail::is_in_experts(module.path) || module.is_bypassed) {
      left_out.push_back(module.path);
    } else {
      found.push_back(&module);
    }
  }
  if (!left_out.empty()) {
    const size_t count = left_out.size();
    left_out.resize(std::min<size_t>(count, 3));
    warnings.push_back(
        fmt::format("[inject] 'all-linear' leaves out {} layers of experts, or that are not "
                    "called: {}, ...",
                    count, fmt::join(left_out, ", ")));
  }
  return found;
}

/// The modules that a list or an expression names; each name must match one.
Found named(const Modules& modules, const ModuleNames& targets, const ExpressionMatch& match) {
  const auto check = [&](bool is_met, const std::string& shown) {
    RESLORA_CHECK(is_met,
                  "[inject] target_modules must match module names; got '{}', which matches "
                  "nothing (candidates: {})",
                  shown, candidates(modules));
  };
  for (const std::string& name : targets.names())
    check(std::any_of(modules.begin(), modules.end(),
                      [&](const ModuleInfo& m) { return is_or_ends_with(m.path, name); }),
          name);
  Found found;
  for (const ModuleInfo& module : modules)
    if (!module.path.empty() && targets.matches(module.path, match)) found.push_back(&module);
  if (!targets.is_list()) check(!found.empty(), targets.expression());
  return found;
}

template <typename Predicate>
void keep(Found& found, const Predicate& is_kept) {
  found.erase(std::remove_if(found.begin(), found.end(),
                             [&](const ModuleInfo* module) { return !is_kept(module->path); }),
              found.end());
}

void leave_out_excluded(Found& found, const ModuleNames& excluded, const ExpressionMatch& match,
                        Names& warnings) {
  if (!excluded.is_given() || (excluded.is_list() && excluded.names().empty())) return;
  const size_t before = found.size();
  keep(found, [&](const std::string& path) { return !excluded.matches(path, match); });
  if (found.size() == before)
    warnings.push_back(
        fmt::format("[inject] exclude_modules {} excluded nothing", excluded.shown()));
}

void keep_indices(Found& found, const ResLoraConfig& config) {
  if (config.layers_to_transform().empty()) return;
  std::set<int64_t> missing(config.layers_to_transform().begin(),
                            config.layers_to_transform().end());
  const std::set<int64_t> wanted = missing;
  keep(found, [&](const std::string& path) {
    const int64_t index = layer_index(config, path);
    missing.erase(index);
    return wanted.count(index) > 0;
  });
  RESLORA_CHECK(missing.empty(),
                "[inject] layers_to_transform must name layers that have targets; got [{}]",
                fmt::join(missing, ", "));
}

void check_supported(const Found& found) {
  Names bad;
  for (const ModuleInfo* module : found)
    if (module->in_features == 0 || module->is_bypassed)
      bad.push_back(fmt::format("{} ({})", module->path, module->type));
  const size_t more = bad.size() > 5 ? bad.size() - 5 : 0;
  bad.resize(bad.size() - more);
  RESLORA_CHECK(bad.empty(),
                "[inject] targets must be linear layers that are called; got {}{} (name them in "
                "exclude_modules)",
                fmt::join(bad, ", "), more > 0 ? fmt::format(" and {} more", more) : "");
}

template <typename T>
void check_pattern_keys(const char* option, const Patterns<T>& patterns, const Found& found,
                        const ExpressionMatch& match) {
  for (const auto& item : patterns) {
    const std::string& pattern = item.first;
    if (std::any_of(found.begin(), found.end(), [&](const ModuleInfo* module) {
          return matches_pattern(module->path, pattern, match);
        }))
      continue;
    Names shown;
    for (size_t i = 0; i < std::min<size_t>(found.size(), 3); ++i) shown.push_back(found[i]->path);
    RESLORA_CHECK(false,
                  "[inject] {} must match adapted layers; got '{}', which matches none of {}, ...",
                  option, pattern, fmt::join(shown, ", "));
  }
}

Names find_saved(const Modules& modules, const Names& names) {
  Names found;
  for (const std::string& name : names) {
    const size_t before = found.size();
    for (const ModuleInfo& module : modules)
      if (is_or_ends_with(module.path, name)) found.push_back(module.path);
    RESLORA_CHECK(found.size() > before, "[inject] modules_to_save must match modules; got '{}'",
                  name);
  }
  Names unique;
  for (const std::string& path : found)
    if (!contains(unique, path)) unique.push_back(path);
  return unique;
}

// ---- Chains ------------------------------------------------------------------------------------

/// A path with its layers' indices replaced by `*`.
std::string chain_key(const std::unordered_map<std::string, const ModuleInfo*>& modules,
                      const std::string& path) {
  Names parts = parts_of(path);
  std::vector<size_t> numbers;
  std::vector<size_t> starred;
  for (size_t i = 0; i < parts.size() && (i == 0 || parts[i - 1] != "experts"); ++i) {
    const bool is_level = i > 0 && (parts[i - 1] == "down_blocks" || parts[i - 1] == "up_blocks");
    if (!is_number(parts[i]) || is_level) continue;
    numbers.push_back(i);
    const auto container = modules.find(joined(parts, i));
    if (container != modules.end() && container->second->is_uniform) starred.push_back(i);
  }
  if (starred.empty() && !numbers.empty()) starred.push_back(numbers.front());
  for (const size_t i : starred) parts[i] = "*";
  return joined(parts, parts.size());
}

/// The value of the first pattern that matches a path, else `otherwise`.
template <typename T>
T value_for(const Patterns<T>& patterns, const std::string& path, T otherwise,
            const ExpressionMatch& match) {
  for (const auto& [pattern, value] : patterns)
    if (matches_pattern(path, pattern, match)) return value;
  return otherwise;
}

}  // namespace

std::vector<std::string> default_targets(const std::vector<ModuleInfo>& modules) {
  std::set<std::string> kinds;
  for (const ModuleInfo& module : modules)
    if (module.is_linear) kinds.insert(last_part(module.path));
  for (const Names& targets : kDefaultTargets)
    if (std::all_of(targets.begin(), targets.end(),
                    [&](const std::string& name) { return kinds.count(name) > 0; }))
      return targets;
  RESLORA_CHECK(false,
                "[inject] target_modules must be given; got none (candidates: {}; or 'all-linear')",
                candidates(modules));
}

Matching match_layers(const std::vector<ModuleInfo>& modules, const ResLoraConfig& config,
                      const ExpressionMatch& match) {
  Matching matching;
  ModuleNames targets = config.target_modules();
  if (!targets.is_given()) targets = default_targets(modules);
  Found found = targets.is_all_linear() ? all_linear(modules, matching.warnings)
                                        : named(modules, targets, match);
  leave_out_excluded(found, config.exclude_modules(), match, matching.warnings);
  keep(found, [&](const std::string& path) { return !is_under(config.modules_to_save(), path); });
  keep_indices(found, config);
  RESLORA_CHECK(!found.empty(),
                "[inject] target_modules must match a layer; got {}, which matches none that is "
                "not excluded or in modules_to_save (candidates: {})",
                targets.shown(), candidates(modules));
  check_supported(found);
  check_pattern_keys("rank_pattern", config.rank_pattern(), found, match);
  check_pattern_keys("alpha_pattern", config.alpha_pattern(), found, match);
  for (const ModuleInfo* module : found) matching.layers.push_back(module->path);
  matching.saved = find_saved(modules, config.modules_to_save());
  matching.targets = std::move(targets);
  return matching;
}

int64_t rank_of(const ResLoraConfig& config, const std::string& path,
                const ExpressionMatch& match) {
  return value_for(config.rank_pattern(), path, config.r(), match);
}

RankAndScaling rank_and_scaling(const ResLoraConfig& config, const std::string& path,
                                const ExpressionMatch& match) {
  const int64_t r = rank_of(config, path, match);
  const double alpha = value_for(config.alpha_pattern(), path, config.lora_alpha(), match);
  return {r, scaling_of(alpha, r, config.use_rslora())};
}

std::vector<ChainRecord> find_chains(const std::vector<ModuleInfo>& modules,
                                     const std::vector<std::string>& layers,
                                     const ResLoraConfig& config, const ExpressionMatch& match) {
  std::unordered_map<std::string, const ModuleInfo*> by_path;
  for (const ModuleInfo& module : modules) by_path[module.path] = &module;
  std::vector<ChainRecord> chains;
  std::unordered_map<std::string, size_t> places;
  const Shortcut shortcut = parse_shortcut(config.res_mode());
  const bool hands_rows_on = shortcut == Shortcut::kIs || shortcut == Shortcut::kMs;
  for (const std::string& path : layers) {
    RESLORA_CHECK(by_path.count(path) > 0, "[inject] a layer must be one of the modules; got '{}'",
                  path);
    const ModuleInfo& module = *by_path.at(path);
    std::string key = chain_key(by_path, path);
    if (hands_rows_on && !module.rows.empty()) key += fmt::format(" ({})", module.rows);
    const auto [place, is_new] = places.emplace(key, chains.size());
    if (is_new) chains.push_back({key, {}});
    const RankAndScaling own = rank_and_scaling(config, path, match);
    chains[place->second].layers.push_back(
        {path, module.in_features, module.out_features, own.r, own.scaling});
  }
  return chains;
}

std::string warning_without_links(const std::vector<const Chain*>& chains) {
  if (chains.empty()) return "";
  for (const Chain* chain : chains)
    RESLORA_CHECK(chain != nullptr, "[inject] chains must be given; got a null pointer");
  const ResLoraConfig& config = chains.front()->config();
  if (config.res_mode() == "none" || config.pre_num() == 0) return "";
  for (const Chain* chain : chains)
    for (int64_t n = 0; n < chain->size(); ++n)
      if (chain->is_linked(n)) return "";
  return fmt::format(
      "[inject] no two adapted layers are linked: res_mode='{}' works like plain LoRA here "
      "(print_links shows the chains)",
      config.res_mode());
}

}  // namespace reslora
