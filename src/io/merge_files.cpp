// A saved adapter, planned on views of mapped files and written with them.
#include <ATen/Functions.h>
#include <reslora/merge_files.h>
#include <reslora/model_files.h>

#include <map>
#include <set>

#include "core/check.h"
#include "io/factor_names.h"
#include "io/folders.h"
#include "io/saved_adapter.h"

namespace reslora {
namespace {

using Edits = std::map<std::string, TensorEdit>;

/// The adapter's chains over the weights of the files.
std::vector<ChainView> views_of(const detail::SavedAdapter& saved, const ModelFiles& files) {
  const std::set<std::string> names(files.names().begin(), files.names().end());
  std::vector<ChainView> views;
  for (const ChainRecord& record : saved.file.chains) {
    ChainView& view = views.emplace_back(ChainView{Chain(saved.config, record.layers), {}});
    for (const LayerShape& layer : record.layers) {
      RESLORA_CHECK(names.count(layer.name + ".weight") > 0,
                    "[merge_files] the base must hold the adapted layers; got no tensor {}.weight",
                    layer.name);
      LayerView& own = view.layers.emplace_back();
      own.weight = files.tensor(layer.name + ".weight");
      own.A = saved.file.tensors.at(detail::key_of_a(layer.name));
      own.B = saved.file.tensors.at(detail::key_of_b(layer.name));
      RESLORA_CHECK(
          at::isfinite(own.A).all().item<bool>() && at::isfinite(own.B).all().item<bool>(),
          "[merge_files] an adapter must be finite; got NaN or infinity in layer {}", layer.name);
      RESLORA_CHECK(at::isFloatingType(own.weight.scalar_type()),
                    "[merge_files] an adapted weight must be floating; got {} in {}.weight",
                    c10::toString(own.weight.scalar_type()), layer.name);
      RESLORA_CHECK(
          own.weight.sizes() == at::IntArrayRef({layer.out_features, layer.in_features}),
          "[merge_files] the base must be that of the adapter; got {}.weight [{}], which should be "
          "[{}, {}]",
          layer.name, fmt::join(own.weight.sizes(), ", "), layer.out_features, layer.in_features);
      if (names.count(layer.name + ".bias") > 0) own.bias = files.tensor(layer.name + ".bias");
      const auto known = saved.statistics.find(layer.name);
      if (known == saved.statistics.end()) continue;
      own.norms = known->second.norms;
      own.fit = known->second.fit;
    }
  }
  return views;
}

/// What changes: layers, and the trained heads.
Edits edits_of(const MergePlan& plan, const detail::SavedAdapter& saved) {
  Edits edits;
  for (const LayerMerge& layer : plan.layers()) {
    edits[layer.name + ".weight"].layer = layer;
    if (!layer.bias.defined()) continue;
    TensorEdit& edit = edits[layer.name + ".bias"];
    edit.layer = layer;
    edit.is_bias = true;
  }
  for (const auto& [name, tensor] : saved.file.tensors)
    if (!detail::is_factor(name)) edits[name].replacement = tensor;
  return edits;
}

}  // namespace

std::vector<LayerMerge> merge_files(const std::vector<std::string>& base,
                                    const std::string& adapter, const std::string& output,
                                    const MergeFilesOptions& options) {
  RESLORA_CHECK(!base.empty(), "[merge_files] the base must be files; got none");
  RESLORA_CHECK(!options.dtype || at::isFloatingType(*options.dtype),
                "[merge_files] dtype must be a floating one; got {}",
                c10::toString(*options.dtype));
  const ModelFiles files(base);
  const detail::SavedAdapter saved = detail::read_folder(adapter);
  const std::string method =
      options.merge_method.empty() ? saved.config.merge_method() : options.merge_method;
  const MergePlan plan(views_of(saved, files), method);
  const Edits edits = edits_of(plan, saved);
  std::map<std::string, std::vector<std::string>> names;  // by path
  for (const std::string& name : files.names()) names[files.path_of(name)].push_back(name);
  const std::set<std::string> known(files.names().begin(), files.names().end());
  for (const auto& [name, edit] : edits)  // heads that the base has not
    if (known.count(name) == 0) names[base.back()].push_back(name);
  const auto target = [&](const std::string& path) {
    return output + "/" + path.substr(path.rfind('/') + 1);
  };
  std::set<std::string> targets;
  for (const std::string& path : base) {
    RESLORA_CHECK(targets.insert(target(path)).second && !detail::exists(target(path)),
                  "[merge_files] an output must be a new file; got {}, which is there",
                  target(path));
  }
  detail::make_folder(output);
  int64_t done = 0;
  for (const std::string& path : base) {
    int64_t own = 0;
    WriteOptions write{options.dtype, files.metadata_of(path), {}};
    write.progress = [&](int64_t bytes) {
      own = bytes;
      if (options.progress) options.progress(done + bytes);
    };
    files.write(target(path), names[path], edits, write);
    done += own;
  }
  return plan.layers();
}

}  // namespace reslora
