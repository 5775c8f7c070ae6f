// An adapter's folder with all that is in it; see saved_adapter.h.
#include "io/saved_adapter.h"

#include <reslora/adapter_folder.h>

#include "io/folders.h"

namespace reslora::detail {

SavedAdapter read_folder(const std::string& folder) {
  SavedAdapter saved;
  saved.file = load_adapter_folder(folder);
  saved.config = config_from_json(saved.file.config_json, in_folder(folder, kConfigName));
  saved.statistics = statistics_beside(folder, saved.file);
  return saved;
}

}  // namespace reslora::detail
