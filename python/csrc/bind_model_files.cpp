// A model's files and their merged copies.
#include <reslora/adapted_files.h>
#include <reslora/merge_files.h>
#include <reslora/model_files.h>

#include <filesystem>
#include <map>

#include "bindings.h"

namespace reslora::python {
namespace {

using Path = std::filesystem::path;

void bind_adapted_files(py::module_& m) {
  py::class_<AdaptedFiles>(m, "AdaptedFiles", "The files of a base as a saved adapter sees them.")
      .def(py::init<const ModelFiles&, const AdapterFile&, const ExpressionMatch&>(),
           py::arg("files"), py::arg("adapter"), py::arg("match"))
      .def("plan", &AdaptedFiles::plan, py::arg("statistics"), py::arg("merge_method"),
           py::arg("use_affine") = true, NoGil())
      .def(
          "edits",
          [](const AdaptedFiles& adapted, const MergePlan& plan, bool ties_embeddings,
             const std::string& device) {
            return with_warnings(
                [&] { return adapted.edits(plan, ties_embeddings, at::Device(device)); });
          },
          py::arg("plan"), py::arg("ties_embeddings") = false, py::arg("device") = "cpu");
  m.def("plan_adapter", &plan_adapter, py::arg("adapter"), py::arg("statistics"),
        py::arg("merge_method"), py::arg("match"),
        "Plan the merge of a saved adapter without its base.");
  m.def("check_one_place", &check_one_place, py::arg("adapter"),
        "Raise where a layer of a saved adapter hangs at several places.");
  m.def(
      "merge_files",
      [](const std::vector<std::string>& base, const Path& adapter, const Path& output,
         const std::string& merge_method) {
        MergeFilesOptions options;
        options.merge_method = merge_method;
        return on_disk(
            [&] { return merge_files(base, adapter.string(), output.string(), options); });
      },
      py::arg("base"), py::arg("adapter"), py::arg("output"), py::arg("merge_method") = "",
      "Merge as C++ programs do.");
}

}  // namespace

void bind_model_files(py::module_& m) {
  py::class_<TensorEdit>(m, "TensorEdit", "What happens to one tensor on its way to the output.")
      .def(py::init([](const std::optional<LayerMerge>& layer, bool is_transposed, bool is_bias,
                       const MaybeTensor& replacement) {
             return TensorEdit{layer, is_transposed, is_bias, replacement};
           }),
           py::arg("layer") = std::nullopt, py::arg("is_transposed") = false,
           py::arg("is_bias") = false, py::arg("replacement") = std::nullopt)
      .def_readonly("replacement", &TensorEdit::replacement);
  py::class_<ModelFiles>(m, "ModelFiles", "The safetensors files of a model, mapped.")
      .def(py::init<const std::vector<std::string>&>(), py::arg("paths"), NoGil())
      .def_property_readonly("names", &ModelFiles::names)
      .def("names_by_path", &ModelFiles::names_by_path, py::arg("edits"))
      .def("tensor", &ModelFiles::tensor, py::arg("name"))
      .def(
          "write",
          [](const ModelFiles& files, const std::string& path,
             const std::vector<std::string>& names, const std::map<std::string, TensorEdit>& edits,
             std::optional<at::ScalarType> dtype,
             const std::map<std::string, std::string>& metadata,
             const std::function<void(int64_t)>& progress) {
            on_disk([&] { files.write(path, names, edits, {dtype, metadata, progress}); });
          },
          py::arg("path"), py::arg("names"), py::arg("edits"), py::arg("dtype") = std::nullopt,
          py::arg("metadata") = std::map<std::string, std::string>(),
          py::arg("progress") = nullptr);
  bind_adapted_files(m);
}

}  // namespace reslora::python
