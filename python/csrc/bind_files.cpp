// Safetensors files and adapters.
#include <reslora/adapted_files.h>
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/config_json.h>
#include <reslora/stage.h>
#include <reslora/statistics_io.h>

#include <filesystem>
#include <map>
#include <memory>

#include "bindings.h"

namespace reslora::python {

namespace {

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
      py::arg("path"), NoGil(), "Read the tensors and the metadata of a safetensors file.");
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
      .def_readonly("tensors", &AdapterFile::tensors)
      .def_readonly("sum", &AdapterFile::sum)
      .def_property_readonly("transposed_chains", &transposed_chains)
      .def_property_readonly("other_places", &other_places);
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
      [](const Path& path) { return with_warnings([&] { return load_adapter(path.string()); }); },
      py::arg("path"), "Read and check an adapter.");
  m.def(
      "sum_in_header", [](const Path& path) { return sum_in_header(path.string()); },
      py::arg("path"), "Return the checksum in the header of an adapter's weights, or ''.");
  m.def(
      "statistics_beside",
      [](const Path& folder, const AdapterFile& adapter) {
        return with_warnings([&] { return statistics_beside(folder.string(), adapter); });
      },
      py::arg("folder"), py::arg("adapter"), "Read the statistics in the folder of an adapter.");
}

/// Calls `read` on a folder; tells a file that is missing from one that the system refuses.
template <typename Read>
auto adapter_in(const std::filesystem::path& folder, const ExpressionMatch& match, Read read) {
  try {
    return read(folder.string(), match);
  } catch (const c10::ValueError&) {
    throw;
  } catch (const c10::Error& error) {
    const auto is_there = [&](const char* name) {
      return std::filesystem::is_regular_file(folder / name);
    };
    if (is_there(kConfigName) && is_there(kWeightsName))
      throw SystemRefusal(error.what_without_backtrace());
    throw NotFound(error.what_without_backtrace());
  }
}

void bind_folder(py::module_& m) {
  using Path = std::filesystem::path;
  m.attr("CONFIG_NAME") = kConfigName;
  m.attr("WEIGHTS_NAME") = kWeightsName;
  m.attr("STATISTICS_NAME") = kStatisticsName;
  m.attr("MODEL_PREFIX") = kModelPrefix;
  m.attr("PEFT_TYPE") = kPeftType;
  m.def(
      "factor_names",
      [](const std::string& layer) { return std::pair(key_of_a(layer), key_of_b(layer)); },
      py::arg("layer"), "Return how files name A and B of a layer.");
  m.def("is_factor", &is_factor, py::arg("key"),
        "Tell whether a tensor of an adapter's file is an A or B; others belong to heads.");
  m.def(
      "load_adapter_folder",
      [](const Path& folder, const ExpressionMatch& match) {
        return with_warnings([&] { return adapter_in(folder, match, load_adapter_folder); });
      },
      py::arg("folder"), py::arg("match"), "Read and check an adapter's folder.");
  m.def(
      "load_saved_adapter",
      [](const Path& folder, const ExpressionMatch& match) {
        const SavedAdapter saved =
            with_warnings([&] { return adapter_in(folder, match, load_saved_adapter); });
        return std::pair(saved.file, saved.statistics);
      },
      py::arg("folder"), py::arg("match"), "Read an adapter's folder with its statistics.");
  m.def(
      "check_formula",
      [](const std::string& model, const std::string& file) {
        check_formula(checked_config(model), checked_config(file));
      },
      py::arg("model"), py::arg("file"),
      "Raise ValueError where options (JSON) differ that change what given A and B compute.");
  m.def(
      "check_ranks",
      [](const std::string& config, const std::vector<NamedChain>& chains,
         const ExpressionMatch& match) {
        check_ranks(checked_config(config), records_from(chains), match);
      },
      py::arg("config"), py::arg("chains"), py::arg("match"),
      "Raise ValueError unless options (JSON) give chains their ranks and scalings.");
  m.def("check_tensors", &check_tensors, py::arg("model"), py::arg("file"),
        "Raise ValueError unless a file holds exactly the tensors that a model loads.");
  m.def("check_head", &check_head, py::arg("key"), py::arg("head"),
        "Raise ValueError for a tensor of modules_to_save that an adapter's file cannot hold.");
}

void bind_stage(py::module_& m) {
  using Path = std::filesystem::path;
  py::class_<Stage>(m, "Stage", "What becomes visible on disk at once.")
      .def(py::init([](const Path& folder, bool is_whole) {
             const auto kind = is_whole ? Stage::Kind::kFolder : Stage::Kind::kFiles;
             return on_disk([&] { return std::make_unique<Stage>(folder.string(), kind); });
           }),
           py::arg("folder"), py::kw_only(), py::arg("is_whole") = false)
      .def_property_readonly("place", [](const Stage& stage) { return Path(stage.place()); })
      .def(
          "path", [](Stage& stage, const std::string& name) { return Path(stage.path(name)); },
          py::arg("name"))
      .def("remove", &Stage::remove, py::arg("name"))
      .def("__enter__", [](const py::object& stage) { return stage; })
      .def(
          "__exit__",
          [](Stage& stage, const py::object& kind, const py::object&, const py::object&) {
            const bool is_done = kind.is_none();
            on_disk([&] {
              try {
                if (is_done) stage.commit();
              } catch (...) {
                stage.discard();
                throw;
              }
              stage.discard();
            });
          },
          py::arg("kind"), py::arg("error"), py::arg("trace"));
  m.def(
      "stage_adapter",
      [](Stage& stage, const std::string& config_json, const std::vector<NamedChain>& chains,
         const std::map<std::string, Tensor>& tensors,
         const std::map<std::string, LayerStatistics>& statistics) {
        stage_adapter(stage, {config_json, records_from(chains), tensors}, statistics);
      },
      py::arg("stage"), py::arg("config_json"), py::arg("chains"), py::arg("tensors"),
      py::arg("statistics"), NoGil(), "Write an adapter's files for one commit.");
  m.def(
      "finish_saves", [](const Path& folder) { finish_saves(folder.string()); }, py::arg("folder"),
      "Finish the saves to a folder that died, as the next save there would.");
  m.def(
      "write_text",
      [](const Path& path, const std::string& text) {
        on_disk([&] { write_text(path.string(), text); });
      },
      py::arg("path"), py::arg("text"), "Write a text file atomically.");
}

}  // namespace

void bind_files(py::module_& m) {
  bind_tensors(m);
  bind_stage(m);
  bind_adapter(m);
  bind_folder(m);
}

}  // namespace reslora::python
