// Reading an adapter's folder while others may write it; see load_saved_adapter.
#include <c10/util/Exception.h>
#include <reslora/adapter_folder.h>
#include <reslora/config_json.h>

#include "io/folders.h"

namespace reslora {
namespace {

constexpr int kAttempts = 10;  // each time another save has come between

/// True where the weights are still those that were read: what was read beside them is theirs too.
bool is_current(const std::string& folder, const AdapterFile& adapter) {
  return sum_in_header(detail::in_folder(folder, kWeightsName)) == adapter.sum;
}

}  // namespace

SavedAdapter load_saved_adapter(const std::string& folder, const ExpressionMatch& match) {
  for (int attempt = 1;; ++attempt) {
    const bool is_last = attempt == kAttempts;
    SavedAdapter saved;
    try {
      saved.file = load_adapter_folder(folder, match);
      const std::string path = detail::in_folder(folder, kConfigName);
      saved.config = config_from_json(saved.file.config_json, path, match);
      saved.statistics = statistics_beside(folder, saved.file);
      if (is_last || is_current(folder, saved.file)) return saved;
    } catch (const c10::ValueError&) {  // of statistics: those of the save that came between
      if (is_last || saved.file.sum.empty() || is_current(folder, saved.file)) throw;
    } catch (const c10::Error&) {  // a file has gone since it was looked for
      if (is_last) throw;
    }
  }
}

}  // namespace reslora
