// What the files of the module share: types as Python sees them, and who binds what.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <reslora/chain.h>
#include <reslora/chain_view.h>
#include <reslora/norm_window.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace reslora::python {

namespace py = pybind11;

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using NamedChain = std::pair<std::string, std::vector<LayerShape>>;
using NoGil = py::call_guard<py::gil_scoped_release>;

inline Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

inline MaybeTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

inline std::optional<Fit> or_none(const Fit& fit) {
  return fit.A.defined() ? std::optional<Fit>(fit) : std::nullopt;
}

std::vector<ChainRecord> records_from(const std::vector<NamedChain>& chains);
/// The norms of a layer, undefined where there are none.
NormWindow window_from(const MaybeTensor& norms, const MaybeTensor& count);
/// The options in a JSON text; `match` reads the regular expressions among them.
ResLoraConfig config_from(const std::string& json, const ExpressionMatch& match);

void bind_config(py::module_& m);
void bind_chain(py::module_& m);
void bind_matching(py::module_& m);
void bind_views(py::module_& m);
void bind_merge(py::module_& m);
void bind_calibration(py::module_& m);
void bind_files(py::module_& m);
void bind_model_files(py::module_& m);
void bind_formulas(py::module_& m);

}  // namespace reslora::python
