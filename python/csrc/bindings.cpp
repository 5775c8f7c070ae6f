// reslora._C: the C++ functions that Python calls, and nothing else. The only file with pybind11.
//
// Errors: a c10::Error becomes the Python exception of the same name, with its one sentence and
// without the C++ backtrace. Long calls release the GIL; `progress` takes it back by itself.
// Importing this module loads libreslora.so, which registers the ops of torch.ops.reslora.
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <reslora/adapter_io.h>
#include <reslora/chain.h>
#include <reslora/config.h>
#include <reslora/formulas.h>
#include <reslora/merge.h>
#include <reslora/norm_window.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using at::Tensor;
using reslora::Chain;
using reslora::ResLoraConfig;
using MaybeTensor = std::optional<Tensor>;
using LayerTuple = std::tuple<std::string, int64_t, int64_t, int64_t, double>;
using ChainTuple = std::pair<std::string, std::vector<LayerTuple>>;
using ViewTuple = std::tuple<MaybeTensor, Tensor, Tensor, MaybeTensor, MaybeTensor>;
using BlockTuple = std::tuple<Tensor, MaybeTensor, Tensor, Tensor, double>;
using NoGil = py::call_guard<py::gil_scoped_release>;

// ---- errors

void translate_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    PyErr_SetString(PyExc_IndexError, e.what_without_backtrace());
  } catch (const c10::NotImplementedError& e) {
    PyErr_SetString(PyExc_NotImplementedError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

// ---- values that differ between Python and C++

Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

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

reslora::LayerShape shape_from(const LayerTuple& layer) {
  const auto& [name, in_features, out_features, r, scaling] = layer;
  return {name, in_features, out_features, r, scaling};
}

std::vector<reslora::LayerShape> shapes_from(const std::vector<LayerTuple>& layers) {
  std::vector<reslora::LayerShape> shapes;
  for (const LayerTuple& layer : layers) shapes.push_back(shape_from(layer));
  return shapes;
}

LayerTuple tuple_from(const reslora::LayerShape& layer) {
  return {layer.name, layer.in_features, layer.out_features, layer.r, layer.scaling};
}

std::vector<LayerTuple> tuples_from(const std::vector<reslora::LayerShape>& layers) {
  std::vector<LayerTuple> tuples;
  for (const auto& layer : layers) tuples.push_back(tuple_from(layer));
  return tuples;
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

std::string handed_name(const reslora::Wiring& wiring) {
  switch (wiring.handed) {
    case reslora::Handed::kTap:
      return "tap";
    case reslora::Handed::kS:
      return "s";
    default:
      return "nothing";
  }
}

reslora::NormWindow window_from(const MaybeTensor& norms, const MaybeTensor& count) {
  if (!norms.has_value() && !count.has_value()) return {};
  return {or_undefined(norms), or_undefined(count)};
}

reslora::ChainView view_from(const std::pair<Chain, std::vector<ViewTuple>>& chain) {
  reslora::ChainView view{chain.first, {}};
  for (const auto& [weight, A, B, norms, count] : chain.second) {
    view.layers.push_back({or_undefined(weight), A, B, window_from(norms, count)});
  }
  return view;
}

reslora::formulas::Block block_from(const BlockTuple& block) {
  const auto& [W, bias, A, B, scaling] = block;
  return {W, or_undefined(bias), A, B, scaling};
}

std::vector<reslora::formulas::Block> blocks_from(const std::vector<BlockTuple>& blocks) {
  std::vector<reslora::formulas::Block> list;
  for (const BlockTuple& block : blocks) list.push_back(block_from(block));
  return list;
}

reslora::Norm norm_from(const std::string& which) {
  TORCH_CHECK_VALUE(which == "input" || which == "own_product",
                    "[norm_window] which must be 'input' or 'own_product'; got '", which, "'");
  return which == "input" ? reslora::Norm::kInput : reslora::Norm::kOwnProduct;
}

// ---- what Python sees

void bind_config(py::module_& m) {
  m.def(
      "validate_config", [](const py::dict& config) { reslora::validate(config_from(config)); },
      py::arg("config"), "Raise ValueError for the first option out of its range.");
  m.def(
      "config_defaults", [] { return dict_from(ResLoraConfig()); },
      "Return the C++ options with their defaults.");
  m.def("scaling_of", &reslora::scaling_of, py::arg("lora_alpha"), py::arg("r"),
        py::arg("use_rslora"), "Return lora_alpha / r, or lora_alpha / sqrt(r).");
  m.def(
      "window_mean",
      [](const Tensor& norms, const Tensor& count, const std::string& which) {
        return reslora::NormWindow(norms, count).mean(norm_from(which));
      },
      py::arg("norms"), py::arg("count"), py::arg("which"),
      "Return the mean of a norm window's valid entries, None where it has none.");
}

void bind_chain(py::module_& m) {
  py::class_<reslora::Wiring>(m, "Wiring", "What one layer reads and hands on.")
      .def_readonly("a", &reslora::Wiring::a)
      .def_readonly("b", &reslora::Wiring::b)
      .def_readonly("scaling", &reslora::Wiring::scaling)
      .def_readonly("taps", &reslora::Wiring::taps)
      .def_property_readonly("handed", &handed_name)
      .def_readonly("is_doubled", &reslora::Wiring::is_doubled)
      .def_readonly("broken", &reslora::Wiring::broken);
  py::class_<Chain>(m, "Chain", "The links between the adapted layers of one kind.")
      .def(py::init(&make_chain), py::arg("config"), py::arg("layers"))
      .def("__len__", &Chain::size)
      .def_property_readonly("size", &Chain::size)
      .def_property_readonly("shortcut",
                             [](const Chain& c) { return reslora::shortcut_name(c.shortcut()); })
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

reslora::MergePlan make_plan(const std::vector<std::pair<Chain, std::vector<ViewTuple>>>& chains,
                             const std::string& merge_method) {
  std::vector<reslora::ChainView> views;
  for (const auto& chain : chains) views.push_back(view_from(chain));
  return reslora::MergePlan(views, merge_method);
}

void bind_merge(py::module_& m) {
  py::class_<reslora::LayerMerge>(m, "LayerMerge", "What was decided for one layer: W* = W + B A.")
      .def_readonly("name", &reslora::LayerMerge::name)
      .def_property_readonly(
          "rule", [](const reslora::LayerMerge& l) { return reslora::merge_rule_name(l.rule); })
      .def_readonly("alpha_star", &reslora::LayerMerge::alpha_star)
      .def_readonly("A", &reslora::LayerMerge::A)
      .def_readonly("B", &reslora::LayerMerge::B);
  py::class_<reslora::MergePlan>(m, "MergePlan", "Plan, apply and revert a merge.")
      .def(py::init(&make_plan), py::arg("chains"), py::arg("merge_method"), NoGil())
      .def_property_readonly("layers", &reslora::MergePlan::layers)
      .def_property_readonly("fell_back_to_weight", &reslora::MergePlan::fell_back_to_weight)
      .def_property_readonly("is_applied", &reslora::MergePlan::is_applied)
      .def("apply", &reslora::MergePlan::apply, py::arg("keep_originals") = true,
           py::arg("safe_merge") = false, py::arg("progress") = nullptr, NoGil())
      .def("revert", &reslora::MergePlan::revert, NoGil());
  m.def("padded_factors", &reslora::padded_factors, py::arg("layer"), py::arg("R"),
        "Pad a planned pair with zeros to rank R.");
}

void bind_files(py::module_& m) {
  using Tensors = std::map<std::string, Tensor>;
  using Metadata = std::map<std::string, std::string>;
  using Path = std::filesystem::path;
  m.def(
      "load_tensors",
      [](const Path& path) {
        reslora::TensorFile file = reslora::load_tensors(path.string());
        return std::pair(std::move(file.tensors), std::move(file.metadata));
      },
      py::arg("path"), NoGil(), "Read a safetensors file.");
  m.def(
      "save_tensors",
      [](const Path& path, const Tensors& tensors, const Metadata& metadata) {
        reslora::save_tensors(path.string(), {tensors, metadata});
      },
      py::arg("path"), py::arg("tensors"), py::arg("metadata") = Metadata(), NoGil(),
      "Write a safetensors file atomically.");
  py::class_<reslora::AdapterFile>(m, "AdapterFile", "An unmerged ResLoRA adapter.")
      .def_readonly("config_json", &reslora::AdapterFile::config_json)
      .def_property_readonly("chains",
                             [](const reslora::AdapterFile& file) {
                               std::vector<ChainTuple> chains;
                               for (const auto& chain : file.chains) {
                                 chains.emplace_back(chain.name, tuples_from(chain.layers));
                               }
                               return chains;
                             })
      .def_readonly("tensors", &reslora::AdapterFile::tensors);
  m.def(
      "save_adapter",
      [](const Path& path, const std::string& config_json, const std::vector<ChainTuple>& chains,
         const Tensors& tensors) {
        reslora::AdapterFile file{config_json, {}, tensors};
        for (const auto& [name, layers] : chains)
          file.chains.push_back({name, shapes_from(layers)});
        reslora::save_adapter(path.string(), file);
      },
      py::arg("path"), py::arg("config_json"), py::arg("chains"), py::arg("tensors"), NoGil(),
      "Write an adapter atomically.");
  m.def(
      "load_adapter", [](const Path& path) { return reslora::load_adapter(path.string()); },
      py::arg("path"), NoGil(), "Read and check an adapter.");
}

void bind_forward_formulas(py::module_& m) {
  namespace f = reslora::formulas;
  m.def(
      "forward_none",
      [](const BlockTuple& block, const Tensor& x) {
        return f::forward_none(block_from(block), x);
      },
      py::arg("block"), py::arg("x"), NoGil());
  m.def(
      "forward_is",
      [](const BlockTuple& block, const Tensor& x, const MaybeTensor& x_previous) {
        return f::forward_is(block_from(block), x, or_undefined(x_previous));
      },
      py::arg("block"), py::arg("x"), py::arg("x_previous"), NoGil());
  m.def(
      "forward_bs",
      [](const std::vector<BlockTuple>& blocks, int64_t n, int64_t m, const Tensor& x) {
        return f::forward_bs(blocks_from(blocks), n, m, x);
      },
      py::arg("blocks"), py::arg("n"), py::arg("m"), py::arg("x"), NoGil());
  m.def(
      "forward_ms",
      [](const std::vector<BlockTuple>& blocks, int64_t n, int64_t m,
         const std::vector<Tensor>& xs) { return f::forward_ms(blocks_from(blocks), n, m, xs); },
      py::arg("blocks"), py::arg("n"), py::arg("m"), py::arg("xs"), NoGil());
}

void bind_merge_formulas(py::module_& m) {
  namespace f = reslora::formulas;
  m.def("alpha_star_input", &f::alpha_star_input, py::arg("f_previous"), py::arg("f_own"));
  m.def("alpha_star_weight", &f::alpha_star_weight, py::arg("merged_norms"), py::arg("n"),
        py::arg("k"));
  m.def(
      "merged_none", [](const BlockTuple& block) { return f::merged_none(block_from(block)); },
      py::arg("block"), NoGil());
  m.def(
      "merged_is",
      [](const BlockTuple& block, double alpha_star) {
        return f::merged_is(block_from(block), alpha_star);
      },
      py::arg("block"), py::arg("alpha_star"), NoGil());
  m.def(
      "merged_bs",
      [](const std::vector<BlockTuple>& blocks, int64_t n, int64_t m) {
        return f::merged_bs(blocks_from(blocks), n, m);
      },
      py::arg("blocks"), py::arg("n"), py::arg("m"), NoGil());
  m.def(
      "merged_ms_input",
      [](const BlockTuple& block, const std::vector<double>& alpha_star) {
        return f::merged_ms_input(block_from(block), alpha_star);
      },
      py::arg("block"), py::arg("alpha_star"), NoGil());
  m.def(
      "merged_ms_weight",
      [](const std::vector<BlockTuple>& blocks, int64_t n, const std::vector<double>& alpha_star) {
        return f::merged_ms_weight(blocks_from(blocks), n, alpha_star);
      },
      py::arg("blocks"), py::arg("n"), py::arg("alpha_star"), NoGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ side of reslora.";
  py::register_local_exception_translator(&translate_errors);
  bind_config(m);
  bind_chain(m);
  bind_merge(m);
  bind_files(m);
  py::module_ formulas = m.def_submodule("formulas", "The paper's formulas, literally.");
  bind_forward_formulas(formulas);
  bind_merge_formulas(formulas);
}
