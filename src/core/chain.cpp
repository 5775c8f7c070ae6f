// Links the layers of a chain: which blocks, taps and scalings each layer uses.
#include <reslora/chain.h>
#include <reslora/matching.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "core/check.h"
#include "core/config_options.h"

namespace reslora {
namespace {

void check_layer(const LayerShape& layer) {
  RESLORA_CHECK(
      layer.in_features >= 0 && layer.out_features >= 0,
      "[chain] in_features and out_features must not be negative; got {} and {} (layer {})",
      layer.in_features, layer.out_features, layer.name);
  RESLORA_CHECK(layer.r >= 1, "[chain] r must be at least 1; got {} (layer {})", layer.r,
                layer.name);
  RESLORA_CHECK(std::isfinite(layer.scaling), "[chain] scaling must be finite; got {} (layer {})",
                layer.scaling, layer.name);
}

void check_left_out(const LayerShape& layer, int64_t n) {
  for (const int64_t other : layer.left_out)
    RESLORA_CHECK(other >= 0 && other < n,
                  "[chain] left_out must name positions before the layer's own, {}; got {} "
                  "(layer {})",
                  n, other, layer.name);
}

/// strict_links: every layer must look like the first.
void check_same_features(const LayerShape& first, const LayerShape& layer) {
  RESLORA_CHECK(layer.in_features == first.in_features && layer.out_features == first.out_features,
                "[chain] strict_links demands the same in_features and out_features in all layers "
                "of a chain; "
                "got {} -> {} (layer {}) after {} -> {} (layer {})",
                layer.in_features, layer.out_features, layer.name, first.in_features,
                first.out_features, first.name);
}

}  // namespace

bool operator==(const LayerShape& a, const LayerShape& b) {
  return std::tie(a.name, a.in_features, a.out_features, a.r, a.scaling) ==
         std::tie(b.name, b.in_features, b.out_features, b.r, b.scaling);
}

std::string shown(const LayerShape& layer) {
  return fmt::format("{} ({} -> {}, r {}, scaling {})", layer.name, layer.in_features,
                     layer.out_features, layer.r, layer.scaling);
}

Chain::Chain(const ResLoraConfig& config, std::vector<LayerShape> layers)
    : config_(config), shortcut_(Shortcut::kNone), layers_(std::move(layers)) {
  detail::validate_values(config_);
  shortcut_ = parse_shortcut(config_.res_mode());
  wire();
}

void Chain::wire() {
  wirings_.clear();
  is_in_experts_.clear();
  const bool is_plain = shortcut_ == Shortcut::kNone || config_.pre_num() == 0;
  for (int64_t n = 0; n < size(); ++n) {
    check_layer(layers_[n]);
    check_left_out(layers_[n], n);
    if (config_.strict_links() && !is_plain) check_same_features(layers_[0], layers_[n]);
    Wiring plain;
    plain.a = plain.b = {n};
    plain.scaling = {layers_[n].scaling};
    wirings_.push_back(std::move(plain));
    is_in_experts_.push_back(is_in_experts(layers_[n].name));
  }
  if (is_plain) return;
  for (int64_t n = 0; n < size(); ++n) {
    if (shortcut_ == Shortcut::kIs) wire_input(n);
    if (shortcut_ == Shortcut::kBs) wire_block(n);
    if (shortcut_ == Shortcut::kMs) wire_middle(n);
  }
  for (Wiring& own : wirings_)
    own.keep_tap = own.handed == Handed::kTap && own.a.size() == own.b.size();
}

void Chain::wire_input(int64_t n) {
  Wiring& own = wirings_[n];
  if (n == 0) {
    // The paper takes x_0 for the missing x_{-1}: s B A (x + x) = 2s B A x.
    own.is_doubled = config_.first_block() == "double";
    if (own.is_doubled) own.scaling[0] *= 2;
    return;
  }
  if (!may_see_the_same_rows(n, n - 1) || leaves_out(n, n - 1)) return;
  const LayerShape& previous = layers_[n - 1];
  if (previous.in_features != layers_[n].in_features) {
    break_link(
        n, n - 1,
        fmt::format("in_features {} and {} differ", layers_[n].in_features, previous.in_features));
    return;
  }
  wirings_[n - 1].a.push_back(n);
  wirings_[n - 1].handed = Handed::kTap;
  own.taps = {n - 1};
}

void Chain::wire_block(int64_t n) {
  Wiring& own = wirings_[n];
  const LayerShape& layer = layers_[n];
  for (int64_t j = n - 1; j >= window_start(n); --j) {
    const LayerShape& other = layers_[j];
    if (other.in_features != layer.in_features || other.out_features != layer.out_features) {
      break_link(n, j,
                 fmt::format("{} -> {} and {} -> {} features differ", layer.in_features,
                             layer.out_features, other.in_features, other.out_features));
      break;
    }
    own.b.insert(own.b.begin(), j);
    own.scaling.insert(own.scaling.begin(), other.scaling);
  }
  own.a = own.b;
}

void Chain::wire_middle(int64_t n) {
  Wiring& own = wirings_[n];
  std::vector<int64_t> window;  // nearest first
  for (int64_t j = n - 1; j >= window_start(n); --j) {
    if (!may_see_the_same_rows(n, j)) break;
    if (layers_[j].r != layers_[n].r) {
      break_link(n, j, fmt::format("r {} and {} differ", layers_[n].r, layers_[j].r));
      break;
    }
    if (leaves_out(n, j)) {
      if (config_.pre_num() == -1) break;  // its tap holds those of all layers before it
      continue;
    }
    window.push_back(j);
  }
  // With m = -1 what entered B of layer n-1 is already the sum of all before it.
  if (config_.pre_num() == -1 && !window.empty()) window.resize(1);
  for (const int64_t j : window) {
    const bool is_own_product = wirings_[j].taps.empty() || config_.pre_num() == -1;
    wirings_[j].handed = is_own_product ? Handed::kS : Handed::kTap;
  }
  own.taps = std::move(window);
}

/// A tap is added row by row: breaks the link where two layers never see the same rows.
bool Chain::may_see_the_same_rows(int64_t n, int64_t previous) {
  if (!is_in_experts_[n] && !is_in_experts_[previous]) return true;
  break_link(n, previous, "experts see other tokens in each layer");
  return false;
}

/// True where the layer at n does not read the tap of `previous`, by what is known of their calls.
bool Chain::leaves_out(int64_t n, int64_t previous) {
  const std::vector<int64_t>& known = layers_[n].left_out;
  if (std::find(known.begin(), known.end(), previous) == known.end()) return false;
  break_link(n, previous, "they were called unequally often in one forward");
  return true;
}

int64_t Chain::window_start(int64_t n) const {
  const int64_t m = config_.pre_num();
  return m == -1 ? 0 : std::max<int64_t>(0, n - m);
}

void Chain::break_link(int64_t n, int64_t previous, const std::string& why) {
  std::string sentence =
      fmt::format("{} is not linked to {}: {}", layers_[n].name, layers_[previous].name, why);
  RESLORA_CHECK(!config_.strict_links(),
                "[chain] strict_links demands every link; got a broken one: {}", sentence);
  wirings_[n].broken.push_back(std::move(sentence));
}

size_t Chain::checked(int64_t n) const {
  RESLORA_CHECK(n >= 0 && n < size(), "[chain] n must be the index of a layer; got {} of {} layers",
                n, size());
  return static_cast<size_t>(n);
}

bool Chain::is_linked(int64_t n) const {
  const Wiring& own = wiring(n);
  return !own.taps.empty() || own.b.size() > 1;
}

std::vector<int64_t> Chain::reached(int64_t n) const {
  const Wiring& own = wiring(n);
  if (shortcut_ == Shortcut::kBs) return {own.b.rbegin() + 1, own.b.rend()};
  if (shortcut_ != Shortcut::kMs || config_.pre_num() != -1) return own.taps;
  std::vector<int64_t> all;
  for (int64_t j = n; !wirings_[j].taps.empty(); --j) all.push_back(j - 1);
  return all;
}

bool Chain::merges_exactly(int64_t n) const {
  return !is_linked(n) || shortcut_ == Shortcut::kNone || shortcut_ == Shortcut::kBs;
}

void Chain::leave_out(int64_t n, const std::vector<int64_t>& others) {
  Chain next = *this;
  std::vector<int64_t>& known = next.layers_[checked(n)].left_out;
  for (const int64_t other : others)
    if (std::find(known.begin(), known.end(), other) == known.end()) known.push_back(other);
  std::sort(known.begin(), known.end());
  next.wire();
  *this = std::move(next);
}

ChainRecord record_of(const std::string& name, const Chain& chain) {
  ChainRecord record{name, {}};
  for (int64_t n = 0; n < chain.size(); ++n) record.layers.push_back(chain.layer(n));
  return record;
}

void check_chains(const std::vector<ChainRecord>& model, const std::vector<ChainRecord>& file) {
  const std::vector<LayerShape> none;
  const auto layers_of = [&](const std::vector<ChainRecord>& records, const std::string& name) {
    const auto at = std::find_if(records.begin(), records.end(),
                                 [&](const ChainRecord& record) { return record.name == name; });
    return at == records.end() ? &none : &at->layers;
  };
  const auto text = [](const std::vector<LayerShape>& layers, size_t n) {
    return n < layers.size() ? shown(layers[n]) : "nothing";
  };
  for (const std::vector<ChainRecord>* records : {&model, &file})
    for (const ChainRecord& record : *records) {
      const std::vector<LayerShape>& own = *layers_of(model, record.name);
      const std::vector<LayerShape>& stored = *layers_of(file, record.name);
      if (own == stored) continue;
      size_t n = 0;
      while (n < std::min(own.size(), stored.size()) && own[n] == stored[n]) ++n;
      RESLORA_CHECK(false,
                    "[load] the adapter must be of this model; got chain {} with {} layers in the "
                    "model and {} in the file, first difference at {}: {} and {}",
                    record.name, own.size(), stored.size(), n, text(own, n), text(stored, n));
    }
}

}  // namespace reslora
