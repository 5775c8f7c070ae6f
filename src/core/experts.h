// Which layers are experts, by their paths. Experts see the tokens that were routed to them, others
// in each layer: no shortcut that hands rows on may link them, and "all-linear" leaves them out.
#pragma once

#include <string>

namespace reslora::detail {

/// True where a part of the path names routed experts ("experts", "local_experts", "expert_0",
/// "experts_3"). Shared experts see every token ("shared_expert", "shared_experts"), and so does
/// what a model of one expert calls by that name ("action_expert"): these are no experts here.
bool is_in_experts(const std::string& path);

}  // namespace reslora::detail
