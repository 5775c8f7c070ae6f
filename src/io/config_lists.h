// What an adapter's config lists beside the options; more in reslora/adapted_files.h.
#pragma once

#include <reslora/adapter_io.h>

#include <map>
#include <string>
#include <vector>

namespace reslora::detail {

/// The parameters of other modules that are an adapted layer's weight too, by layer. Throws
/// c10::ValueError for a config that does not list them.
std::map<std::string, std::vector<std::string>> tied_weights(const AdapterFile& adapter);

}  // namespace reslora::detail
