// What the files of the module share: types as Python sees them, and who binds what.
#pragma once

#include <c10/util/Exception.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <reslora/chain.h>
#include <reslora/chain_view.h>
#include <reslora/norm_window.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace reslora::python {

namespace py = pybind11;

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
using NamedChain = std::pair<std::string, std::vector<LayerShape>>;
using NoGil = py::call_guard<py::gil_scoped_release>;

/// What the system refused: OSError in Python.
class SystemRefusal : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A file that is not there: FileNotFoundError in Python.
class NotFound : public SystemRefusal {
 public:
  using SystemRefusal::SystemRefusal;
};

/// Runs `body`, which writes to disk, without the GIL.
template <typename Body>
auto on_disk(Body body) {
  const py::gil_scoped_release no_gil;
  try {
    return body();
  } catch (const c10::ValueError&) {
    throw;
  } catch (const c10::Error& error) {
    throw SystemRefusal(error.what_without_backtrace());
  }
}

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

/// Runs `body` without the GIL and gives its warnings as Python's.
template <typename Body>
auto with_warnings(Body body) {
  Warnings warnings;
  auto result = [&] {
    const py::gil_scoped_release no_gil;
    const c10::WarningUtils::WarningHandlerGuard guard(&warnings);
    return body();
  }();
  warnings.raise();
  return result;
}

inline Tensor or_undefined(const MaybeTensor& tensor) { return tensor.value_or(Tensor()); }

inline std::vector<Tensor> or_undefined(const std::vector<MaybeTensor>& tensors) {
  std::vector<Tensor> found;
  for (const MaybeTensor& tensor : tensors) found.push_back(or_undefined(tensor));
  return found;
}

inline MaybeTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

inline std::optional<Fit> or_none(const Fit& fit) {
  return fit.A.defined() ? std::optional<Fit>(fit) : std::nullopt;
}

std::vector<ChainRecord> records_from(const std::vector<NamedChain>& chains);
/// The norms of a layer, undefined where there are none.
NormWindow window_from(const MaybeTensor& norms, const MaybeTensor& count,
                       const MaybeTensor& products);
/// The options in a JSON text; `match` reads the regular expressions among them.
ResLoraConfig config_from(const std::string& json, const ExpressionMatch& match);
/// The same of options that were checked before: the expressions are not tried.
ResLoraConfig checked_config(const std::string& json);

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
