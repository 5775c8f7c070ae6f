// An adapter's folder as it was read: for loading into a model and for merging into files.
#pragma once

#include <reslora/adapter_io.h>
#include <reslora/config_json.h>
#include <reslora/statistics_io.h>

#include <map>
#include <string>

namespace reslora::detail {

struct SavedAdapter {
  AdapterFile file;
  ResLoraConfig config;
  std::map<std::string, LayerStatistics> statistics;
};

/// Reads and checks a folder; throws as `load_adapter_folder` and `statistics_beside` do.
SavedAdapter read_folder(const std::string& folder);

}  // namespace reslora::detail
