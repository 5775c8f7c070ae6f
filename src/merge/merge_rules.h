// The merge rules: from a chain and its norms or fits to one low-rank pair for each layer.
#pragma once

#include <reslora/chain_view.h>
#include <reslora/merge.h>

#include <string>
#include <vector>

namespace reslora::detail {

/// Throws c10::ValueError, in the name of `op`, unless a view has the tensors of every layer.
void check_size(const ChainView& view, const char* op);

/// The same, and where A and B do not fit the chain.
void check_view(const ChainView& view, const char* op = "merge");

/// Throws c10::ValueError where a layer has a fit that does not fit it.
void check_fit(const ChainView& view, int64_t n, const char* op = "merge");

/// The one place that decides which rule serves chains when the user names none (empty
/// `merge_method`): `lsq` where every layer that needs it has a fit, else `projected` where every
/// one has sums of products, else `input` where every norm is there, else `weight`. Layers that
/// merge exactly do so under every rule.
MergeRule choose_rule(const std::vector<ChainView>& chains, const std::string& merge_method);

/// The pair of every layer of one chain. `use_affine`: take the affine form of a fit where there is
/// one.
std::vector<LayerMerge> plan_chain(const ChainView& view, MergeRule rule, bool use_affine);

/// True where every layer of the chain merges exactly.
bool merges_exactly(const Chain& chain);

}  // namespace reslora::detail
