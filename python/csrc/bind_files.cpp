// Safetensors files and adapters.
#include <reslora/adapter_io.h>

#include <filesystem>
#include <map>

#include "bindings.h"

namespace reslora::python {

namespace {

/// Keeps the library's warnings, to be given as Python's without a place in our sources.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { sentences_.push_back(warning.msg()); }
  void raise() const {
    for (const std::string& sentence : sentences_) {
      if (PyErr_WarnEx(PyExc_UserWarning, sentence.c_str(), 2) < 0) throw py::error_already_set();
    }
  }

 private:
  std::vector<std::string> sentences_;
};

void bind_tensors(py::module_& m) {
  using Tensors = std::map<std::string, Tensor>;
  using Metadata = std::map<std::string, std::string>;
  using Path = std::filesystem::path;
  m.def(
      "load_tensors",
      [](const Path& path) {
        TensorFile file = load_tensors(path.string());
        return std::pair(std::move(file.tensors), std::move(file.metadata));
      },
      py::arg("path"), NoGil(), "Read a safetensors file.");
  m.def(
      "save_tensors",
      [](const Path& path, const Tensors& tensors, const Metadata& metadata) {
        save_tensors(path.string(), {tensors, metadata});
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata") = Metadata(), NoGil(),
      "Write a safetensors file atomically.");
  m.def("tensors_sum", &tensors_sum, py::arg("tensors"), NoGil(),
        "Return the SHA-256 of tensors by name.");
}

void bind_adapter(py::module_& m) {
  using Tensors = std::map<std::string, Tensor>;
  using Path = std::filesystem::path;
  py::class_<AdapterFile>(m, "AdapterFile", "An unmerged ResLoRA adapter.")
      .def_readonly("config_json", &AdapterFile::config_json)
      .def_property_readonly("chains",
                             [](const AdapterFile& file) {
                               std::vector<NamedChain> chains;
                               for (const auto& chain : file.chains)
                                 chains.emplace_back(chain.name, chain.layers);
                               return chains;
                             })
      .def_readonly("tensors", &AdapterFile::tensors);
  m.def(
      "save_adapter",
      [](const Path& path, const std::string& config_json, const std::vector<NamedChain>& chains,
         const Tensors& tensors) {
        save_adapter(path.string(), {config_json, records_from(chains), tensors});
      },
      py::arg("path"), py::arg("config_json"), py::arg("chains"), py::arg("tensors"), NoGil(),
      "Write an adapter atomically.");
  m.def(
      "load_adapter",
      [](const Path& path) {
        Warnings warnings;
        AdapterFile adapter = [&] {
          const py::gil_scoped_release no_gil;
          const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
          return load_adapter(path.string());
        }();
        warnings.raise();
        return adapter;
      },
      py::arg("path"), "Read and check an adapter.");
}

}  // namespace

void bind_files(py::module_& m) {
  bind_tensors(m);
  bind_adapter(m);
}

}  // namespace reslora::python
