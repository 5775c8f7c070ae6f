// A saved adapter, planned on views of mapped files and written with them.
#include <reslora/adapted_files.h>
#include <reslora/adapter_folder.h>
#include <reslora/merge_files.h>
#include <reslora/stage.h>

#include <algorithm>
#include <map>
#include <set>

#include "core/check.h"
#include "io/folders.h"
#include "io/tensor_types.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

/// What config.json beside a model's file says of its embeddings and its head.
bool ties_embeddings(const std::string& file) {
  const std::string path = file.substr(0, file.size() - name_of(file).size()) + "config.json";
  const std::string text = detail::file_text(path);
  bool is_tied = false;
  if (text.empty()) return is_tied;
  detail::on_file("merge", path, [&] {
    detail::JsonReader config(text, "the config");
    config.object([&](const std::string& key) {
      if (key != "tie_word_embeddings") return config.skip();
      is_tied = config.boolean();
    });
  });
  return is_tied;
}

/// Demands that every file of the base gives a new one.
void check_outputs(const std::vector<std::string>& base, const std::string& output) {
  std::set<std::string> names;
  for (const std::string& path : base) {
    const std::string target = detail::in_folder(output, name_of(path));
    RESLORA_CHECK(names.insert(name_of(path)).second && !detail::exists(target),
                  "[merge] an output must be a new file; got {}, which is there", target);
  }
}

}  // namespace

std::vector<LayerMerge> merge_files(const std::vector<std::string>& base,
                                    const std::string& adapter, const std::string& output,
                                    const MergeFilesOptions& options) {
  RESLORA_CHECK(!base.empty(), "[merge] the base must be files; got none");
  const ModelFiles files(base);
  const SavedAdapter saved = load_saved_adapter(adapter);
  const AdaptedFiles adapted(files, saved.file);
  const MergePlan plan = adapted.plan(saved.statistics, options.merge_method);
  const bool has_heads = std::any_of(saved.file.tensors.begin(), saved.file.tensors.end(),
                                     [](const auto& item) { return !is_factor(item.first); });
  const bool is_tied = options.ties_embeddings ? *options.ties_embeddings
                                               : has_heads && ties_embeddings(base.front());
  const std::map<std::string, TensorEdit> edits = adapted.edits(plan, is_tied, options.device);
  const auto names = files.names_by_path(edits);
  check_outputs(base, output);
  if (plan.fell_back_to_weight())
    TORCH_WARN("[merge] the rule 'weight' is taken: no statistics lie beside the adapter");
  Stage stage(output);
  int64_t done = 0;
  for (const std::string& path : base) {
    int64_t own = 0;
    WriteOptions write{options.dtype, files.metadata_of(path), {}};
    write.progress = [&](int64_t bytes) {
      own = bytes;
      if (options.progress) options.progress(done + bytes);
    };
    files.write(stage.path(name_of(path)), names.at(path), edits, write);
    done += own;
  }
  stage.commit();
  return plan.layers();
}

}  // namespace reslora
