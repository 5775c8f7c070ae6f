// The options: their list, their rules, and how two configs differ. They come as JSON.
#include <reslora/config_json.h>
#include <reslora/merge_rule.h>

#include "bindings.h"

namespace reslora::python {
namespace {

/// For comparisons of options that were checked before.
ResLoraConfig config_unchecked(const std::string& json) {
  return config_from(json, [](const std::string&, const std::string&) { return false; });
}

}  // namespace

ResLoraConfig config_from(const std::string& json, const ExpressionMatch& match) {
  return config_from_json(json, /*source=*/"", match);
}

void bind_config(py::module_& m) {
  py::class_<OptionInfo>(m, "OptionInfo", "An option of ResLoraConfig.")
      .def_readonly("name", &OptionInfo::name)
      .def_readonly("kind", &OptionInfo::kind)
      .def_readonly("default_json", &OptionInfo::default_json);
  m.def("options", &options, "Return the options that the C++ library has.");
  m.def(
      "validate_config",
      [](const std::string& config, const ExpressionMatch& match, const std::string& source) {
        config_from_json(config, source, match);
      },
      py::arg("config"), py::arg("match"), py::arg("source") = "",
      "Raise ValueError for the first option (JSON) out of its range.");
  m.def(
      "config_to_json",
      [](const std::string& config) { return config_to_json(config_unchecked(config)); },
      py::arg("config"), "Return options (JSON) as the text of an adapter_config.json.");
  m.def(
      "first_difference",
      [](const std::string& a, const std::string& b) {
        return first_difference(config_unchecked(a), config_unchecked(b));
      },
      py::arg("a"), py::arg("b"), "Return the first option in which two configs (JSON) differ.");
  m.def(
      "formula_difference",
      [](const std::string& a, const std::string& b) {
        return formula_difference(config_unchecked(a), config_unchecked(b));
      },
      py::arg("a"), py::arg("b"), "Return the first option that differs and changes the formula.");
  m.def("scaling_of", &scaling_of, py::arg("lora_alpha"), py::arg("r"), py::arg("use_rslora"),
        "Return lora_alpha / r, or lora_alpha / sqrt(r).");
  m.def("lora_alpha_of", &lora_alpha_of, py::arg("scaling"), py::arg("r"), py::arg("use_rslora"),
        "Return the lora_alpha whose scaling_of is scaling.");
  m.def("shortcut_names", &shortcut_names, "Return what res_mode may be.");
  m.def("merge_methods", &merge_methods, "Return what merge_method may be.");
  m.def(
      "check_merge_method",
      [](const std::string& name, const std::string& where) { parse_merge_rule(name, where); },
      py::arg("name"), py::arg("where"), "Raise ValueError for a name of no merge rule.");
}

}  // namespace reslora::python
