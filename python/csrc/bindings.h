// What the files of the module share: types as Python sees them, and who binds what.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <reslora/chain.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace reslora::python {

namespace py = pybind11;

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using LayerTuple = std::tuple<std::string, int64_t, int64_t, int64_t, double>;
using ChainTuple = std::pair<std::string, std::vector<LayerTuple>>;
using NoGil = py::call_guard<py::gil_scoped_release>;

inline Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

std::vector<LayerShape> shapes_from(const std::vector<LayerTuple>& layers);
std::vector<LayerTuple> tuples_from(const std::vector<LayerShape>& layers);

void bind_chain(py::module_& m);
void bind_matching(py::module_& m);
void bind_merge(py::module_& m);
void bind_files(py::module_& m);
void bind_model_files(py::module_& m);
void bind_formulas(py::module_& m);

}  // namespace reslora::python
