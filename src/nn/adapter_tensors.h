// The tensors of an adapted model under the names that files use.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "nn/adapters_state.h"

namespace reslora::detail {

/// A and B of every layer: `<module>.reslora_A.weight` [r, in], `<module>.reslora_B.weight`;
/// they share the parameters' memory and need no gradient.
std::map<std::string, at::Tensor> factors_of(const Adapters::State& state);

/// The chains' tensors with the fits that are given.
std::vector<ChainView> views_of(const std::vector<LinkedChain>& chains, const Fits& fits);

/// The checksum of A and B: a fit serves these values only.
std::string adapter_sum(const Adapters::State& state);

}  // namespace reslora::detail
