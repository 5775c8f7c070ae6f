/// @file
/// A chain: the adapted layers of one kind in execution order, and the links between them.
///
/// It holds no tensor. From shapes alone it answers, for each layer, which rows of A see x, which B
/// is used, which taps are added and what is handed on: the table of the four shortcuts, as data.
///
/// @verbatim
/// shortcut | A that sees x_n   | added to what enters B | B             | handed on
/// none     | A_n               |                        | B_n           |
/// is       | A_n, A_{n+1}      | tap of n-1             | B_n           | tap = A_{n+1} x_n
/// bs       | A_{n-m} .. A_n    |                        | B_{n-m} .. B_n|
/// ms       | A_n               | taps of n-1 .. n-m     | B_n           | tap = A_n x_n
/// ms, all  | A_n               | running sum of n-1     | B_n           | running sum
/// @endverbatim
///
/// A link needs: `is` equal in_features, `bs` equal in and out, `ms` equal r. Taps are added row by
/// row, so `is` and `ms` never link routed experts, which see other tokens in each layer: a layer
/// is one where a part of its name says so ("experts", "local_experts", "expert_0"; not
/// "shared_experts"). A window is contiguous: the first layer that does not fit ends it, and is
/// named in `broken`. With pre_num = 0 every layer is a row of `none`.
///
/// @code{.cpp}
/// reslora::Chain chain(reslora::ResLoraConfig().res_mode("ms").pre_num(2), shapes);
/// chain.reached(3);  // {2, 1}
/// @endcode
#pragma once

#include <reslora/config.h>
#include <reslora/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace reslora {

/// What a chain needs to know of one layer.
struct LayerShape {
  std::string name;          ///< full module path, for messages and files
  int64_t in_features = 0;   ///< columns of A
  int64_t out_features = 0;  ///< rows of B
  int64_t r = 0;             ///< rank
  double scaling = 1;        ///< lora_alpha / r, or / sqrt(r)
  /// Positions of layers before this one whose taps it does not read, though the shortcut reaches
  /// them: the two layers are called unequally often in a forward of the model, so that it is
  /// unknown which of their calls see the same tokens.
  std::vector<int64_t> left_out = {};
};

/// True where name, sizes, rank and scaling are the same. Links that are left out are no part of
/// it, since a model finds them out while it runs.
RESLORA_API bool operator==(const LayerShape& a, const LayerShape& b);
/// The opposite of `==`.
inline bool operator!=(const LayerShape& a, const LayerShape& b) { return !(a == b); }

/// A layer for messages, such as "layers.0.q (64 -> 64, r 8, scaling 2)".
RESLORA_API std::string shown(const LayerShape& layer);

/// The layers of one chain, as models and files name them.
struct ChainRecord {
  std::string name;                ///< such as "layers.*.q_proj"
  std::vector<LayerShape> layers;  ///< in the order of execution
};

/// Which output of `adapt` a later layer reads.
enum class Handed {
  kNothing,
  kTap,  ///< the output `tap`
  kS,    ///< the output `s`: what entered B, for which no extra tensor is made
};

/// What one layer reads and hands on. Integers are positions in the chain.
struct Wiring {
  std::vector<int64_t> a;            ///< A blocks that see x_n; the first b.size() of them enter B
  std::vector<int64_t> b;            ///< B blocks, in the order of the first A blocks
  std::vector<double> scaling;       ///< one per B block
  std::vector<int64_t> taps;         ///< layers whose tap is added to what enters B
  Handed handed = Handed::kNothing;  ///< what a later layer may read
  bool keep_tap = false;             ///< the tap is the layer's own product A_n x_n
  bool is_doubled = false;           ///< first layer of an `is` chain with first_block = "double"
  std::vector<std::string> broken;   ///< one sentence for each link that cannot be
};

/// The links of one chain; see above.
class RESLORA_API Chain {
 public:
  /// Links `layers` (execution order). Throws c10::ValueError for a bad config or shape, and under
  /// `strict_links` for the first link that cannot be and for a layer whose features are not those
  /// of the first (where links are wanted at all). Cost: O(layers * m), no tensor.
  Chain(const ResLoraConfig& config, std::vector<LayerShape> layers);

  /// Number of layers.
  int64_t size() const { return static_cast<int64_t>(layers_.size()); }
  /// The shortcut that all layers of the chain have.
  Shortcut shortcut() const { return shortcut_; }
  /// The options that the chain was made with.
  const ResLoraConfig& config() const { return config_; }
  // What follows throws c10::ValueError for a position that is none of the chain.

  /// Name, shape and scaling of the layer at a position.
  const LayerShape& layer(int64_t n) const { return layers_[checked(n)]; }
  /// What the layer at a position reads and hands on.
  const Wiring& wiring(int64_t n) const { return wirings_[checked(n)]; }
  /// True where a layer adds something of an earlier one (the first layer never does).
  bool is_linked(int64_t n) const;
  /// The positions whose x or adapter a layer's shortcut reaches, nearest first (empty: not
  /// linked).
  std::vector<int64_t> reached(int64_t n) const;
  /// True where merging is exact: none, bs, and unlinked layers (the first one is unlinked).
  bool merges_exactly(int64_t n) const;
  /// Links the layers anew, of which the one at `n` reads no taps of `others` (positions before n)
  /// from now on; see `LayerShape::left_out`. `bs` has no taps, and goes on as before. Throws
  /// c10::ValueError for a position that is none before n, and under `strict_links`.
  void leave_out(int64_t n, const std::vector<int64_t>& others);

 private:
  void wire();
  void wire_input(int64_t n);
  void wire_block(int64_t n);
  void wire_middle(int64_t n);
  bool may_see_the_same_rows(int64_t n, int64_t previous);
  bool leaves_out(int64_t n, int64_t previous);
  int64_t window_start(int64_t n) const;
  size_t checked(int64_t n) const;
  void break_link(int64_t n, int64_t previous, const std::string& why);

  ResLoraConfig config_;
  Shortcut shortcut_;
  std::vector<LayerShape> layers_;
  std::vector<bool> is_in_experts_;  // by position
  std::vector<Wiring> wirings_;
};

/// A chain's layers under its name, for files.
RESLORA_API ChainRecord record_of(const std::string& name, const Chain& chain);

/// Throws c10::ValueError, naming the first difference, unless the chains of a model are those of
/// an adapter's file, in any order.
RESLORA_API void check_chains(const std::vector<ChainRecord>& model,
                              const std::vector<ChainRecord>& file);

}  // namespace reslora
