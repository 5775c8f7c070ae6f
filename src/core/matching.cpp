// The rules for names: which layers a config means, what is left out, and which chains they form.
#include <reslora/matching.h>

#include <algorithm>
#include <array>
#include <set>
#include <sstream>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "core/check.h"

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
/// What torch.compile, checkpoints and FSDP name the module that they wrap.
constexpr std::array<std::string_view, 3> kWrappers = {
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}};
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
    if (is_in_experts(module.path) || module.is_bypassed) {
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
  const std::vector<int64_t>& wanted = config.layers_to_transform();
  std::set<int64_t> missing(wanted.begin(), wanted.end());
  for (const ModuleInfo* module : found) missing.erase(layer_index(config, module->path));
  keep(found, [&](const std::string& path) { return is_in_layers(config, path); });
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
  for (const std::string& name : names)
    RESLORA_CHECK(std::any_of(modules.begin(), modules.end(),
                              [&](const ModuleInfo& module) {
                                return saved_part(module.path, {name}) == module.path &&
                                       !module.path.empty();
                              }),
                  "[inject] modules_to_save must match modules; got '{}'", name);
  Names found;
  for (const ModuleInfo& module : modules)
    if (!module.path.empty() && saved_part(module.path, names) == module.path)
      found.push_back(module.path);
  return found;
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

/// The name of the chain of the layer at `path`. Where taps are handed on, layers with other rows
/// have chains of their own.
std::string chain_name(const std::unordered_map<std::string, const ModuleInfo*>& modules,
                       const std::string& path, const ResLoraConfig& config) {
  const Shortcut shortcut = parse_shortcut(config.res_mode());
  const bool hands_rows_on = shortcut == Shortcut::kIs || shortcut == Shortcut::kMs;
  const std::string& rows = modules.at(path)->rows;
  std::string key = chain_key(modules, path);
  if (hands_rows_on && !rows.empty()) key += fmt::format(" ({})", rows);
  return key;
}

/// True for a layer that a config means, whatever else it names that a model does not have.
bool is_meant(const ModuleInfo& module, const ResLoraConfig& config, const ExpressionMatch& match) {
  const ModuleNames& targets = config.target_modules();
  const Names& saved = config.modules_to_save();
  const bool is_target = !targets.is_given() || targets.is_all_linear()
                             ? module.is_linear
                             : targets.matches(module.path, match);
  return is_target && !module.is_bypassed && saved_part(module.path, saved).empty() &&
         !config.exclude_modules().matches(module.path, match) && is_in_layers(config, module.path);
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

std::string plain_name(const std::string& path) {
  Names parts = parts_of(path);
  parts.erase(std::remove_if(parts.begin(), parts.end(),
                             [](const std::string& part) {
                               return std::find(kWrappers.begin(), kWrappers.end(), part) !=
                                      kWrappers.end();
                             }),
              parts.end());
  return joined(parts, parts.size());
}

bool is_in_layers(const ResLoraConfig& config, const std::string& path) {
  const std::vector<int64_t>& wanted = config.layers_to_transform();
  return wanted.empty() || contains(config.target_modules().names(), path) ||
         std::find(wanted.begin(), wanted.end(), layer_index(config, path)) != wanted.end();
}

std::string saved_part(const std::string& path, const std::vector<std::string>& names) {
  for (size_t end = path.find('.');; end = path.find('.', end + 1)) {
    const std::string part = path.substr(0, end);
    for (const std::string& name : names)
      if (part.size() >= name.size() &&
          part.compare(part.size() - name.size(), name.size(), name) == 0)
        return part;
    if (end == std::string::npos) return "";
  }
}

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
  keep(found,
       [&](const std::string& path) { return saved_part(path, config.modules_to_save()).empty(); });
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

Matching match_saved(const std::vector<ModuleInfo>& modules, const ResLoraConfig& config,
                     const std::vector<ChainRecord>& chains, const std::vector<std::string>& heads,
                     const ExpressionMatch& match) {
  std::set<std::string> keys;
  std::set<std::string> layers;
  for (const ChainRecord& chain : chains) {
    keys.insert(chain.name);
    for (const LayerShape& layer : chain.layers) layers.insert(layer.name);
  }
  std::unordered_map<std::string, const ModuleInfo*> by_path;
  for (const ModuleInfo& module : modules) by_path[module.path] = &module;
  Matching matching;
  matching.targets = config.target_modules();
  for (const ModuleInfo& module : modules)
    if (module.in_features > 0 && (layers.count(module.path) > 0 ||
                                   (keys.count(chain_name(by_path, module.path, config)) > 0 &&
                                    is_meant(module, config, match))))
      matching.layers.push_back(module.path);
  RESLORA_CHECK(!matching.layers.empty(),
                "[load] the adapter must be of this model; got {}, which matches nothing "
                "(candidates: {})",
                layers.empty() ? "no layer" : *layers.begin(), candidates(modules));
  for (const std::string& head : heads) {
    std::string path = saved_part(head, config.modules_to_save());
    if (by_path.count(path) > 0 && !path.empty() && !contains(matching.saved, path))
      matching.saved.push_back(std::move(path));
  }
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
  for (const std::string& path : layers) {
    RESLORA_CHECK(by_path.count(path) > 0, "[inject] a layer must be one of the modules; got '{}'",
                  path);
    const ModuleInfo& module = *by_path.at(path);
    const std::string key = chain_name(by_path, path, config);
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
