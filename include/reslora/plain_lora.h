/// @file
/// Planned merges as plain LoRA: at one rank, and in the format of PEFT.
///
/// @code{.cpp}
/// reslora::PlainLora lora;
/// lora.layers = plan.layers();             // of a MergePlan
/// reslora::save_plain_lora("lora", lora);  // adapter_config.json, adapter_model.safetensors
/// @endcode
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/export.h>
#include <reslora/merge.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace reslora {

/// Pads a planned pair with zeros to rank R: A [R, in], B [out, R]. With r = lora_alpha = R in the
/// exported config the scale is 1 in every reader of plain LoRA files. Throws c10::ValueError for
/// an R below the pair's rank, and for a layer with the bias of an affine fit, which such files
/// cannot hold.
RESLORA_API std::pair<at::Tensor, at::Tensor> padded_factors(const LayerMerge& layer, int64_t R);

/// A pair of a smaller rank, and what that costs.
struct ReducedFactors {
  LayerMerge layer;  ///< with A [k, in] and B [out, k]
  double error = 0;  ///< |B A - reduced|_F / |B A|_F
};

/// Reduces a planned pair (of bs: rank (m+1) r) to the smallest rank whose error is at most
/// `tolerance`, and never above `max_rank`, by QR of both factors and the SVD of the core between
/// them, in fp64. Throws c10::ValueError for a rank below 1, a tolerance outside [0, 1) and factors
/// that are not finite. Cost: (in + out) R^2.
RESLORA_API ReducedFactors reduced_factors(const LayerMerge& layer, int64_t max_rank,
                                           double tolerance = 1e-7);

/// What `save_plain_lora` writes.
struct PlainLora {
  std::vector<LayerMerge> layers;                 ///< by full module path
  std::map<std::string, at::Tensor> heads = {};   ///< tensors of modules_to_save, by path
  std::vector<std::string> target_modules = {};   ///< default: the paths of the layers
  std::vector<std::string> modules_to_save = {};  ///< as PEFT's option
  bool fan_in_fan_out = false;                    ///< the base holds W^T, as transformers' Conv1D
  std::string base_model_name_or_path = {};       ///< empty: null
  std::string task_type = {};                     ///< empty: null
  std::string revision = {};                      ///< of a base of the Hub; empty: null
};

/// Returns a warning where pairs that were reduced to `rank` lost more than `tolerance` (relative
/// errors of B A, the largest of which is `worst`), else "".
RESLORA_API std::string rank_warning(int64_t rank, double tolerance, double worst);

/// Writes adapter_config.json and adapter_model.safetensors in PEFT's format: every pair padded to
/// the largest rank R, with lora_alpha = r = R. Returns R. Throws c10::ValueError for no layers,
/// for two of one name, for factors that do not fit together, for layers with the bias of an affine
/// fit, and for a folder that holds an unmerged adapter, which would be lost; c10::Error where the
/// system refuses.
RESLORA_API int64_t save_plain_lora(const std::string& folder, const PlainLora& lora);

}  // namespace reslora
