// What an adapter's config lists beside the options; more in reslora/adapted_files.h.
#pragma once

#include <reslora/adapter_io.h>

#include <map>
#include <string>
#include <vector>

namespace reslora::detail {

/// Names of one thing by the name that files know it by.
using OtherNames = std::map<std::string, std::vector<std::string>>;

constexpr const char* kOtherPlaces = "other_places";  ///< of layers
constexpr const char* kTiedWeights = "tied_weights";  ///< of layers and modules_to_save

/// The parameters of other modules that are an adapted layer's weight too, or one of a module in
/// modules_to_save. Throws c10::ValueError for a config that does not list them.
OtherNames tied_weights(const AdapterFile& adapter);

/// What a config lists, as JSON.
std::string listed(const OtherNames& names);

/// Throws c10::ValueError where a weight that a merge would change is another module's too.
void refuse_tied(const OtherNames& tied);

/// Throws c10::ValueError where a layer that a plain LoRA would adapt hangs at several places.
void refuse_other_places(const OtherNames& places);

}  // namespace reslora::detail
