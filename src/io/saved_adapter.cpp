// An adapter's folder with all that is in it; see saved_adapter.h.
#include "io/saved_adapter.h"

#include <reslora/adapter_folder.h>

#include "core/check.h"
#include "io/folders.h"

namespace reslora::detail {

SavedAdapter read_folder(const std::string& folder) {
  constexpr int kAttempts = 10;  // each time another save has come between
  for (int attempt = 1; attempt <= kAttempts; ++attempt) {
    SavedAdapter saved;
    try {
      saved.file = load_adapter_folder(folder);
      saved.config = config_from_json(saved.file.config_json, in_folder(folder, kConfigName));
      saved.statistics = statistics_beside(folder, saved.file);
      if (is_current(folder, saved.file)) return saved;
    } catch (const c10::ValueError&) {  // of statistics: those of the save that came between
      if (saved.file.sum.empty() || is_current(folder, saved.file)) throw;
    } catch (const c10::Error&) {  // a file has gone since it was looked for
      if (attempt == kAttempts) throw;
    }
  }
  RESLORA_CHECK(false, "[load] a folder must not be written all the time while it is read; got {}",
                folder);
}

}  // namespace reslora::detail
