// A model's files and their merged copies.
#include <reslora/model_files.h>

#include <map>

#include "bindings.h"

namespace reslora::python {

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
      .def("path_of", &ModelFiles::path_of, py::arg("name"))
      .def("tensor", &ModelFiles::tensor, py::arg("name"))
      .def(
          "write",
          [](const ModelFiles& files, const std::string& path,
             const std::vector<std::string>& names, const std::map<std::string, TensorEdit>& edits,
             std::optional<at::ScalarType> dtype,
             const std::map<std::string, std::string>& metadata,
             const std::function<void(int64_t)>& progress) {
            files.write(path, names, edits, {dtype, metadata, progress});
          },
          py::arg("path"), py::arg("names"), py::arg("edits"), py::arg("dtype") = std::nullopt,
          py::arg("metadata") = std::map<std::string, std::string>(), py::arg("progress") = nullptr,
          NoGil());
}

}  // namespace reslora::python
