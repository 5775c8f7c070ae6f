// The rules for names: which layers a config means, and which chains they form.
#include <reslora/matching.h>

#include "bindings.h"

namespace reslora::python {
namespace {

std::vector<NamedChain> chains_from(const std::vector<ModuleInfo>& modules,
                                    const std::vector<std::string>& layers,
                                    const std::string& config, const ExpressionMatch& match) {
  std::vector<NamedChain> chains;
  for (ChainRecord& chain : find_chains(modules, layers, config_from(config, match), match))
    chains.emplace_back(std::move(chain.name), std::move(chain.layers));
  return chains;
}

std::vector<std::pair<int64_t, double>> ranks_and_scalings(const std::string& config,
                                                           const std::vector<std::string>& paths,
                                                           const ExpressionMatch& match) {
  const ResLoraConfig options = checked_config(config);
  std::vector<std::pair<int64_t, double>> found;
  for (const std::string& path : paths) {
    const RankAndScaling own = rank_and_scaling(options, path, match);
    found.emplace_back(own.r, own.scaling);
  }
  return found;
}

py::object targets_of(const Matching& matching) {
  if (matching.targets.is_list()) return py::cast(matching.targets.names());
  return py::cast(matching.targets.expression());
}

void bind_names(py::module_& m) {
  m.def("plain_name", &plain_name, py::arg("path"),
        "Return a path without the parts that wrappers of torch put into it.");
  m.def("saved_part", &saved_part, py::arg("path"), py::arg("names"),
        "Return the part of a path that modules_to_save mean by one of `names`, else \"\".");
  m.def("is_in_experts", &is_in_experts, py::arg("path"),
        "Tell whether a part of a path names experts, which see the tokens routed to them.");
  m.def("is_or_ends_with", &is_or_ends_with, py::arg("path"), py::arg("name"),
        "Tell whether a path is `name` or ends with \".\" and `name`.");
  m.def(
      "is_in_layers",
      [](const std::string& config, const std::string& path) {
        return is_in_layers(checked_config(config), path);
      },
      py::arg("config"), py::arg("path"),
      "Tell whether layers_to_transform of a config (JSON) leaves the layer of a path in.");
}

void bind_ranks(py::module_& m) {
  m.def(
      "rank_of",
      [](const std::string& config, const std::string& path, const ExpressionMatch& match) {
        return rank_of(checked_config(config), path, match);
      },
      py::arg("config"), py::arg("path"), py::arg("match"),
      "Return the rank that a config (JSON) gives the layer of a path.");
  m.def("ranks_and_scalings", &ranks_and_scalings, py::arg("config"), py::arg("paths"),
        py::arg("match"),
        "Return (r, scaling) that a config (JSON) gives the layer of every path.");
}

}  // namespace

void bind_matching(py::module_& m) {
  bind_names(m);
  bind_ranks(m);
  py::class_<ModuleInfo>(m, "ModuleInfo", "What the rules for names ask of one module of a model.")
      .def(py::init([](std::string path, std::string type, int64_t in_features,
                       int64_t out_features, bool is_linear, bool is_head, bool is_bypassed,
                       bool is_uniform, std::string rows) {
             return ModuleInfo{std::move(path), std::move(type), in_features,
                               out_features,    is_linear,       is_head,
                               is_bypassed,     is_uniform,      std::move(rows)};
           }),
           py::arg("path"), py::arg("type"), py::arg("in_features"), py::arg("out_features"),
           py::kw_only(), py::arg("is_linear"), py::arg("is_head"), py::arg("is_bypassed"),
           py::arg("is_uniform"), py::arg("rows"))
      .def_readonly("path", &ModuleInfo::path);
  py::class_<Matching>(m, "Matching", "What a config means in a model.")
      .def_property_readonly("targets", &targets_of)
      .def_readonly("layers", &Matching::layers)
      .def_readonly("saved", &Matching::saved)
      .def_readonly("warnings", &Matching::warnings);
  m.def("default_targets", &default_targets, py::arg("modules"),
        "Return what a model calls its queries and values.");
  m.def(
      "match_layers",
      [](const std::vector<ModuleInfo>& modules, const std::string& config,
         const ExpressionMatch& match) {
        return match_layers(modules, config_from(config, match), match);
      },
      py::arg("modules"), py::arg("config"), py::arg("match"),
      "Return the layers that a config (JSON) means.");
  m.def(
      "match_saved",
      [](const std::vector<ModuleInfo>& modules, const std::string& config,
         const std::vector<NamedChain>& chains, const std::vector<std::string>& heads,
         const ExpressionMatch& match) {
        return match_saved(modules, config_from(config, match), records_from(chains), heads, match);
      },
      py::arg("modules"), py::arg("config"), py::arg("chains"), py::arg("heads"), py::arg("match"),
      "Return the layers that the file of an adapter is of.");
  m.def("find_chains", &chains_from, py::arg("modules"), py::arg("layers"), py::arg("config"),
        py::arg("match"), "Return the key and the layers of every chain that `layers` form.");
  m.def(
      "warning_without_links", &warning_without_links, py::arg("chains"),
      "Return the warning where a shortcut is asked for and no two layers are linked, else \"\".");
}

}  // namespace reslora::python
