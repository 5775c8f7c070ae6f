// Chains and norm windows.
#include <reslora/config_json.h>
#include <reslora/initial_factors.h>
#include <reslora/norm_window.h>

#include "bindings.h"

namespace reslora::python {
namespace {

std::vector<LayerShape> layers_of(const Chain& chain) { return record_of("", chain).layers; }

Chain make_chain(const std::string& config, const std::vector<LayerShape>& layers) {
  return Chain(checked_config(config), layers);
}

py::tuple shape_state(const LayerShape& shape) {
  return py::make_tuple(shape.name, shape.in_features, shape.out_features, shape.r, shape.scaling,
                        shape.left_out);
}

/// What a pickle of a layer holds; those of older versions know of no links that are left out.
LayerShape shape_from(const py::tuple& state) {
  LayerShape shape{state[0].cast<std::string>(), state[1].cast<int64_t>(), state[2].cast<int64_t>(),
                   state[3].cast<int64_t>(), state[4].cast<double>()};
  if (state.size() > 5) shape.left_out = state[5].cast<std::vector<int64_t>>();
  return shape;
}

/// What a pickle of a chain holds; those of older versions hold the options as a dict.
Chain chain_from(const py::tuple& state) {
  const bool is_older = py::isinstance<py::dict>(state[0]);
  const py::object config =
      is_older ? py::module_::import("json").attr("dumps")(state[0]) : py::object(state[0]);
  std::vector<LayerShape> layers;
  for (const py::handle& layer : state[1]) layers.push_back(shape_from(layer.cast<py::tuple>()));
  return make_chain(config.cast<std::string>(), layers);
}

py::tuple chain_state(const Chain& chain) {
  py::list layers;
  for (const LayerShape& layer : layers_of(chain)) layers.append(shape_state(layer));
  return py::make_tuple(config_to_json(chain.config()), layers);
}

/// A member of Chain that takes a position, which is IndexError in Python where there is none.
template <typename Result>
auto by_position(Result (Chain::*member)(int64_t) const) {
  return [member](const Chain& chain, int64_t n) -> Result {
    try {
      return (chain.*member)(n);
    } catch (const c10::ValueError& error) {
      throw py::index_error(error.what_without_backtrace());
    }
  };
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

void bind_norms(py::module_& m) {
  m.attr("PRODUCTS_EVERY") = kProductsEvery;
  m.attr("PRODUCTS_DECAY") = kProductsDecay;
  m.def(
      "window_mean",
      [](const Tensor& norms, const Tensor& count, const std::string& which) {
        return NormWindow(norms, count).mean(norm_from(which));
      },
      py::arg("norms"), py::arg("count"), py::arg("which"),
      "Return the mean of a norm window's valid entries, None where it has none.");
  m.def(
      "window_in_order",
      [](const Tensor& norms, const Tensor& count) { return NormWindow(norms, count).in_order(); },
      py::arg("norms"), py::arg("count"),
      "Return a norm window's valid entries [2, filled], oldest first, on the CPU.");
  m.def("set_to_mean_of_ranks", &set_to_mean_of_ranks, py::arg("norms"), py::arg("squares"),
        py::arg("ranks"),
        "Set a window [2, N] to that of all ranks, from the sum over ranks of the squared norms.");
}

void bind_shape(py::module_& m) {
  m.def("fill_factors", &fill_factors, py::arg("A"), py::arg("B"), py::arg("how"), NoGil(),
        "Fill A [r, in] and B [out, r] in place as init_lora_weights says.");
  py::class_<LayerShape>(m, "LayerShape", "What a chain needs to know of one layer.")
      .def(py::init([](std::string name, int64_t in_features, int64_t out_features, int64_t r,
                       double scaling, std::vector<int64_t> left_out) {
             return LayerShape{std::move(name), in_features,        out_features, r,
                               scaling,         std::move(left_out)};
           }),
           py::arg("name"), py::arg("in_features"), py::arg("out_features"), py::arg("r"),
           py::arg("scaling"), py::arg("left_out") = std::vector<int64_t>())
      .def_readonly("name", &LayerShape::name)
      .def_readonly("in_features", &LayerShape::in_features)
      .def_readonly("out_features", &LayerShape::out_features)
      .def_readonly("r", &LayerShape::r)
      .def_readonly("scaling", &LayerShape::scaling)
      .def_readonly("left_out", &LayerShape::left_out)
      .def(
          "__eq__", [](const LayerShape& a, const LayerShape& b) { return a == b; },
          py::is_operator())
      .def("__repr__", &shown)
      .def(py::pickle(&shape_state, &shape_from));
}

}  // namespace

std::vector<ChainRecord> records_from(const std::vector<NamedChain>& chains) {
  std::vector<ChainRecord> records;
  for (const auto& [name, layers] : chains) records.push_back({name, layers});
  return records;
}

NormWindow window_from(const MaybeTensor& norms, const MaybeTensor& count,
                       const MaybeTensor& products) {
  if (!norms.has_value() && !count.has_value()) return {};
  return {or_undefined(norms), or_undefined(count), or_undefined(products)};
}

void bind_chain(py::module_& m) {
  bind_norms(m);
  bind_shape(m);
  m.def(
      "check_chains",
      [](const std::vector<NamedChain>& model, const std::vector<NamedChain>& file) {
        check_chains(records_from(model), records_from(file));
      },
      py::arg("model"), py::arg("file"),
      "Raise ValueError, naming the first difference, unless the chains are the same.");
  py::class_<Wiring>(m, "Wiring", "What one layer reads and hands on.")
      .def_readonly("a", &Wiring::a)
      .def_readonly("b", &Wiring::b)
      .def_readonly("scaling", &Wiring::scaling)
      .def_readonly("taps", &Wiring::taps)
      .def_property_readonly("handed", &handed_name)
      .def_readonly("keep_tap", &Wiring::keep_tap)
      .def_readonly("is_doubled", &Wiring::is_doubled)
      .def_readonly("broken", &Wiring::broken);
  py::class_<Chain>(m, "Chain", "The links between the adapted layers of one kind.")
      .def(py::init(&make_chain), py::arg("config"), py::arg("layers"))
      .def("__len__", &Chain::size)
      .def_property_readonly("size", &Chain::size)
      .def_property_readonly("shortcut", [](const Chain& c) { return shortcut_name(c.shortcut()); })
      .def_property_readonly("config", [](const Chain& c) { return config_to_json(c.config()); })
      .def_property_readonly("layers", &layers_of)
      .def("wiring", by_position(&Chain::wiring), py::arg("n"), py::return_value_policy::copy)
      .def("is_linked", by_position(&Chain::is_linked), py::arg("n"))
      .def("reached", by_position(&Chain::reached), py::arg("n"))
      .def("merges_exactly", by_position(&Chain::merges_exactly), py::arg("n"))
      .def(py::pickle(&chain_state, &chain_from));
}

}  // namespace reslora::python
