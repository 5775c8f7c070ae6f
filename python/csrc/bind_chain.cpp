// Options, chains and norm windows.
#include <reslora/config.h>
#include <reslora/norm_window.h>

#include "bindings.h"

namespace reslora::python {
namespace {

template <typename T>
T value_of(const std::string& key, const py::handle& value, const char* wanted) {
  try {
    return py::cast<T>(value);
  } catch (const py::cast_error&) {
    TORCH_CHECK_VALUE(false, "[config] ", key, " must be ", wanted, "; got ",
                      py::repr(value).cast<std::string>());
  }
}

/// Sets one option by name; false for a name that the C++ side does not know.
bool set_option(ResLoraConfig& config, const std::string& key, const py::handle& value) {
  const auto integer = [&] { return value_of<int64_t>(key, value, "an integer"); };
  const auto number = [&] { return value_of<double>(key, value, "a number"); };
  const auto text = [&] { return value_of<std::string>(key, value, "a string"); };
  const auto truth = [&] { return value_of<bool>(key, value, "True or False"); };
  if (key == "r") return config.r(integer()), true;
  if (key == "lora_alpha") return config.lora_alpha(number()), true;
  if (key == "lora_dropout") return config.lora_dropout(number()), true;
  if (key == "res_mode") return config.res_mode(text()), true;
  if (key == "pre_num") return config.pre_num(integer()), true;
  if (key == "first_block") return config.first_block(text()), true;
  if (key == "use_rslora") return config.use_rslora(truth()), true;
  if (key == "norm_window") return config.norm_window(integer()), true;
  if (key == "detach_taps") return config.detach_taps(truth()), true;
  if (key == "strict_links") return config.strict_links(truth()), true;
  return false;
}

py::dict dict_from(const ResLoraConfig& config) {
  py::dict options;
  options["r"] = config.r();
  options["lora_alpha"] = config.lora_alpha();
  options["lora_dropout"] = config.lora_dropout();
  options["res_mode"] = config.res_mode();
  options["pre_num"] = config.pre_num();
  options["first_block"] = config.first_block();
  options["use_rslora"] = config.use_rslora();
  options["norm_window"] = config.norm_window();
  options["detach_taps"] = config.detach_taps();
  options["strict_links"] = config.strict_links();
  return options;
}

ResLoraConfig config_from(const py::dict& options) {
  ResLoraConfig config;
  for (const auto& [key, value] : options) {
    const std::string name = py::str(key);
    TORCH_CHECK_VALUE(set_option(config, name, value), "[config] the option must be one of ",
                      py::str(", ").attr("join")(dict_from(ResLoraConfig())).cast<std::string>(),
                      "; got '", name, "'");
  }
  return config;
}

LayerShape shape_from(const LayerTuple& layer) {
  const auto& [name, in_features, out_features, r, scaling] = layer;
  return {name, in_features, out_features, r, scaling};
}

LayerTuple tuple_from(const LayerShape& layer) {
  return {layer.name, layer.in_features, layer.out_features, layer.r, layer.scaling};
}

std::vector<LayerTuple> layers_of(const Chain& chain) {
  std::vector<LayerTuple> tuples;
  for (int64_t n = 0; n < chain.size(); ++n) tuples.push_back(tuple_from(chain.layer(n)));
  return tuples;
}

Chain make_chain(const py::dict& config, const std::vector<LayerTuple>& layers) {
  return Chain(config_from(config), shapes_from(layers));
}

int64_t checked(const Chain& chain, int64_t n) {
  TORCH_CHECK_INDEX(n >= 0 && n < chain.size(), "[chain] n must be the index of a layer; got ", n,
                    " of ", chain.size(), " layers");
  return n;
}

std::string handed_name(const Wiring& wiring) {
  switch (wiring.handed) {
    case Handed::kTap:
      return "tap";
    case Handed::kS:
      return "s";
    default:
      return "nothing";
  }
}

Norm norm_from(const std::string& which) {
  TORCH_CHECK_VALUE(which == "input" || which == "own_product",
                    "[norm_window] which must be 'input' or 'own_product'; got '", which, "'");
  return which == "input" ? Norm::kInput : Norm::kOwnProduct;
}

void bind_config(py::module_& m) {
  m.def(
      "validate_config", [](const py::dict& config) { validate(config_from(config)); },
      py::arg("config"), "Raise ValueError for the first option out of its range.");
  m.def(
      "config_defaults", [] { return dict_from(ResLoraConfig()); },
      "Return the C++ options with their defaults.");
  m.def("scaling_of", &scaling_of, py::arg("lora_alpha"), py::arg("r"), py::arg("use_rslora"),
        "Return lora_alpha / r, or lora_alpha / sqrt(r).");
  m.def(
      "window_mean",
      [](const Tensor& norms, const Tensor& count, const std::string& which) {
        return NormWindow(norms, count).mean(norm_from(which));
      },
      py::arg("norms"), py::arg("count"), py::arg("which"),
      "Return the mean of a norm window's valid entries, None where it has none.");
}

}  // namespace

std::vector<LayerShape> shapes_from(const std::vector<LayerTuple>& layers) {
  std::vector<LayerShape> shapes;
  for (const LayerTuple& layer : layers) shapes.push_back(shape_from(layer));
  return shapes;
}

std::vector<LayerTuple> tuples_from(const std::vector<LayerShape>& layers) {
  std::vector<LayerTuple> tuples;
  for (const auto& layer : layers) tuples.push_back(tuple_from(layer));
  return tuples;
}

void bind_chain(py::module_& m) {
  bind_config(m);
  py::class_<Wiring>(m, "Wiring", "What one layer reads and hands on.")
      .def_readonly("a", &Wiring::a)
      .def_readonly("b", &Wiring::b)
      .def_readonly("scaling", &Wiring::scaling)
      .def_readonly("taps", &Wiring::taps)
      .def_property_readonly("handed", &handed_name)
      .def_readonly("is_doubled", &Wiring::is_doubled)
      .def_readonly("broken", &Wiring::broken);
  py::class_<Chain>(m, "Chain", "The links between the adapted layers of one kind.")
      .def(py::init(&make_chain), py::arg("config"), py::arg("layers"))
      .def("__len__", &Chain::size)
      .def_property_readonly("size", &Chain::size)
      .def_property_readonly("shortcut", [](const Chain& c) { return shortcut_name(c.shortcut()); })
      .def_property_readonly("config", [](const Chain& c) { return dict_from(c.config()); })
      .def_property_readonly("layers", &layers_of)
      .def(
          "wiring", [](const Chain& c, int64_t n) { return c.wiring(checked(c, n)); }, py::arg("n"))
      .def(
          "is_linked", [](const Chain& c, int64_t n) { return c.is_linked(checked(c, n)); },
          py::arg("n"))
      .def(
          "reached", [](const Chain& c, int64_t n) { return c.reached(checked(c, n)); },
          py::arg("n"))
      .def(
          "merges_exactly",
          [](const Chain& c, int64_t n) { return c.merges_exactly(checked(c, n)); }, py::arg("n"))
      .def(py::pickle(
          [](const Chain& c) { return py::make_tuple(dict_from(c.config()), layers_of(c)); },
          [](const py::tuple& state) {
            return make_chain(state[0].cast<py::dict>(), state[1].cast<std::vector<LayerTuple>>());
          }));
}

}  // namespace reslora::python
