// Fitting: sums over batches and their fits, padding, and the search for the taps to move.
#include <reslora/calibration.h>
#include <reslora/regression.h>

#include "bindings.h"

namespace reslora::python {
namespace {

void bind_solving(py::module_& m) {
  const FitOptions defaults;
  py::class_<FitOptions>(m, "FitOptions", "How fits are made.")
      .def(py::init([](double ridge, bool affine, int64_t max_cov_bytes, bool keep_sums) {
             return FitOptions{ridge, affine, max_cov_bytes, keep_sums};
           }),
           py::arg("ridge") = defaults.ridge, py::arg("affine") = defaults.affine,
           py::arg("max_cov_bytes") = defaults.max_cov_bytes,
           py::arg("keep_sums") = defaults.keep_sums)
      .def_readonly("ridge", &FitOptions::ridge)
      .def_readonly("affine", &FitOptions::affine)
      .def_readonly("max_cov_bytes", &FitOptions::max_cov_bytes)
      .def_readonly("keep_sums", &FitOptions::keep_sums);
  m.def(
      "solve_fit",
      [](const FitSums& sums, const Tensor& A, const FitOptions& options, const std::string& name,
         const std::optional<ChainView>& chain, int64_t position) {
        return solve_fit(sums, A, options, name,
                         chain ? fit_anchor(*chain, position) : FitAnchor());
      },
      py::arg("sums"), py::arg("A"), py::arg("options"), py::arg("name"),
      py::arg("chain") = std::nullopt, py::arg("position") = 0, NoGil(), "Solve for A' from sums.");
}

void bind_collector(py::module_& m) {
  py::class_<FitCost>(m, "FitCost", "What collecting took.")
      .def_readonly("passes", &FitCost::passes)
      .def_readonly("peak_bytes", &FitCost::peak_bytes)
      .def_readonly("row_file_bytes", &FitCost::row_file_bytes)
      .def_readonly("solver_steps", &FitCost::solver_steps);
  py::class_<FitCollector>(m, "FitCollector", "Sums over calibration batches, and their fits.")
      .def(py::init<std::vector<ChainView>, FitOptions>(), py::arg("chains"), py::arg("options"))
      .def("begin_batch", &FitCollector::begin_batch, py::arg("masks"), NoGil())
      .def("add", &FitCollector::add, py::arg("chain"), py::arg("position"), py::arg("x"),
           py::arg("v"), NoGil())
      .def("end_batch", &FitCollector::end_batch)
      .def("finish_pass", &FitCollector::finish_pass, NoGil())
      .def(
          "fit",
          [](const FitCollector& collector, int64_t chain, int64_t n) {
            return or_none(collector.views().at(chain).layers.at(n).fit);
          },
          py::arg("chain"), py::arg("position"))
      .def("sums", &FitCollector::sums, py::arg("chain"), py::arg("position"))
      .def_property_readonly("cost", &FitCollector::cost)
      .def("padding_warning", &FitCollector::padding_warning);
}

void bind_padding(py::module_& m) {
  m.def("padding_masks", &padding_masks, py::arg("masks"), py::arg("op"), NoGil(),
        "Check the padding masks of a batch (1: a token, 0: padding) and return them as bool.");
  m.def(
      "row_mask",
      [](const std::vector<Tensor>& masks, const std::vector<int64_t>& leading) {
        return row_mask(masks, leading);
      },
      py::arg("masks"), py::arg("leading"),
      "Return the mask that belongs to rows with these leading sizes, flat; None without one.");
}

void bind_moves(py::module_& m) {
  m.def(
      "move_taps", [](const ChainView& chain) { return move_taps(chain); }, py::arg("chain"),
      NoGil(), "Move half of every tap to the layer whose input it reads.");
  py::class_<MovedTaps>(m, "MovedTaps", "What `choose_moves` decided.")
      .def_readonly("chains", &MovedTaps::chains)
      .def_readonly("before", &MovedTaps::before)
      .def_readonly("after", &MovedTaps::after)
      .def_property_readonly("fits", [](const MovedTaps& moved) {
        std::vector<std::vector<std::optional<Fit>>> all;
        for (const auto& fits : moved.fits) {
          auto& own = all.emplace_back();
          for (const Fit& fit : fits) own.push_back(or_none(fit));
        }
        return all;
      });
  m.def("error_sum", &error_sum, py::arg("reference"), py::arg("other"), NoGil(),
        "Return the relative squared error of rows [rows, columns], summed over them.");
  m.def("choose_moves", &choose_moves, py::arg("chains"), py::arg("measure"), NoGil(),
        "Move the taps of those chains whose moved form is nearer to the adapted model.");
  m.def("has_moved_taps", &has_moved_taps, py::arg("chain"),
        "Tell whether the taps of a chain were moved.");
  m.def(
      "measured_batches", [] { return kMeasuredBatches; },
      "Return on how many batches moved taps are tried.");
  m.def(
      "check_current", &check_current, py::arg("fits_sum"), py::arg("adapter_sum"), py::arg("op"),
      py::arg("way_out"),
      "Raise ValueError where fits are of another adapter; `op` and `way_out` frame the sentence.");
  m.def("few_rows_warning", &few_rows_warning, py::arg("chains"),
        "Return a warning where layers saw fewer rows than they have features, else \"\".");
}

}  // namespace

void bind_calibration(py::module_& m) {
  bind_solving(m);
  bind_collector(m);
  bind_padding(m);
  bind_moves(m);
}

}  // namespace reslora::python
