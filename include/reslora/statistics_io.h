/// @file
/// What a later merge needs besides the adapter: norm windows, fits and, on request, covariances.
///
/// @code{.cpp}
/// reslora::save_statistics("adapter_statistics.safetensors", sum, {{"layers.1.q", {norms, fit}}});
/// auto statistics = reslora::load_statistics("adapter_statistics.safetensors", sum);
/// @endcode
///
/// A safetensors file beside the adapter's, bound to it by the checksum of its A and B
/// (tensors_sum): statistics of another adapter, or of the same one before more training, are
/// refused. Written atomically, read strictly.
#pragma once

#include <reslora/adapter_io.h>
#include <reslora/chain_view.h>
#include <reslora/export.h>
#include <reslora/regression.h>

#include <map>
#include <optional>
#include <string>

namespace reslora {

/// What is known of one layer; any part may be absent.
struct LayerStatistics {
  NormWindow norms = {};             ///< of training forwards
  Fit fit = {};                      ///< for the rule `lsq`
  std::optional<FitSums> sums = {};  ///< what the fit was solved from
};

/// Writes statistics by layer. Tensors: `<layer>.norms` [2, N], `.norm_count` [1], `.fit_A`,
/// `.fit_B`, `.affine_A`, `.offset`, `.fit` (fp64: alpha*, residual, affine residual, rows, refine
/// steps), and of sums `.xx` (once for layers that share it), `.vx`, `.x_sum`, `.v_sum`, `.sums`
/// (fp64: vv, rows); the metadata has their SHA-256. `weights_sum` is that of the file of weights
/// that they are saved with (`AdapterFile::sum`); a folder's statistics with another one are those
/// of another save. Throws as save_tensors does, and c10::ValueError for statistics that
/// load_statistics would refuse.
RESLORA_API void save_statistics(const std::string& path, const std::string& adapter_sum,
                                 const std::map<std::string, LayerStatistics>& statistics,
                                 const std::string& weights_sum = "");

/// Reads statistics. Throws c10::ValueError for a file that is malformed, none of ours, or of
/// another adapter than the one with `adapter_sum`.
RESLORA_API std::map<std::string, LayerStatistics> load_statistics(const std::string& path,
                                                                   const std::string& adapter_sum);

/// Reads the statistics in the folder of an adapter that was read; empty where there are none, and,
/// with a warning, where they were saved with other weights.
/// Throws as `load_statistics` does, and for statistics of a layer that the adapter has not and a
/// fit of another shape.
RESLORA_API std::map<std::string, LayerStatistics> statistics_beside(const std::string& folder,
                                                                     const AdapterFile& adapter);

}  // namespace reslora
