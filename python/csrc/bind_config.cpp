// The options: their list, their rules, and how two configs differ. They come as JSON.
#include <reslora/config_json.h>
#include <reslora/merge_rule.h>

#include "bindings.h"

namespace reslora::python {

ResLoraConfig config_from(const std::string& json, const ExpressionMatch& match) {
  return config_from_json(json, /*source=*/"", match);
}

ResLoraConfig checked_config(const std::string& json) {
  return config_from(json, [](const std::string&, const std::string&) { return false; });
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
      "Raise ValueError for the first option (of JSON) out of its range, or of another kind.");
  m.def(
      "config_to_json",
      [](const std::string& config) { return config_to_json(checked_config(config)); },
      py::arg("config"), "Return options (JSON) as the text of an adapter_config.json.");
  m.def(
      "first_difference",
      [](const std::string& a, const std::string& b) {
        return first_difference(checked_config(a), checked_config(b));
      },
      py::arg("a"), py::arg("b"),
      "Return the name of the first option in which two configs (JSON) differ, else \"\".");
  m.def(
      "formula_difference",
      [](const std::string& a, const std::string& b) {
        return formula_difference(checked_config(a), checked_config(b));
      },
      py::arg("a"), py::arg("b"),
      "Return the first option that differs and changes what given A and B compute, else \"\".");
  m.def("scaling_of", &scaling_of, py::arg("lora_alpha"), py::arg("r"), py::arg("use_rslora"),
        "Return lora_alpha / r, or lora_alpha / sqrt(r).");
  m.def("lora_alpha_of", &lora_alpha_of, py::arg("scaling"), py::arg("r"), py::arg("use_rslora"),
        "Return the lora_alpha whose `scaling_of` is `scaling`.");
  m.def("shortcut_names", &shortcut_names, "Return what res_mode may be.");
  m.def("merge_methods", &merge_methods, "Return what merge_method may be.");
  m.def(
      "check_merge_method",
      [](const py::object& name, const std::string& where) {
        // What is no text is shown as Python does, and refused with the same sentence.
        parse_merge_rule(py::isinstance<py::str>(name) ? name.cast<std::string>()
                                                       : py::repr(name).cast<std::string>(),
                         where);
      },
      py::arg("name"), py::arg("where"), "Raise ValueError for a name of no merge rule.");
}

}  // namespace reslora::python
