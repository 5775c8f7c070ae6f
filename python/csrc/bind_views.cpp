// What merging and its files work on: fits, views of tensors, statistics.
#include <reslora/chain_view.h>
#include <reslora/statistics_io.h>

#include "bindings.h"

namespace reslora::python {
namespace {

Fit fit_from(const Tensor& A, const MaybeTensor& B, const MaybeTensor& affine_A,
             const MaybeTensor& offset, double alpha_star, double residual, double affine_residual,
             int64_t rows, int64_t refine_steps) {
  return {A,           or_undefined(B), or_undefined(affine_A), or_undefined(offset),
          alpha_star,  residual,        affine_residual,        rows,
          refine_steps};
}

FitSums sums_from(const Tensor& xx, const Tensor& vx, const Tensor& x_sum, const Tensor& v_sum,
                  double vv, int64_t rows) {
  return {xx, vx, x_sum, v_sum, vv, rows};
}

void bind_fit(py::module_& m) {
  py::class_<Fit>(m, "Fit", "A plain LoRA that stands for a linked layer.")
      .def(py::init(&fit_from), py::arg("A"), py::arg("B") = std::nullopt,
           py::arg("affine_A") = std::nullopt, py::arg("offset") = std::nullopt,
           py::arg("alpha_star") = 0.0, py::arg("residual") = 0.0, py::arg("affine_residual") = 0.0,
           py::arg("rows") = 0, py::arg("refine_steps") = 0)
      .def_readonly("A", &Fit::A)
      .def_property_readonly("B", [](const Fit& fit) { return or_none(fit.B); })
      .def_property_readonly("affine_A", [](const Fit& fit) { return or_none(fit.affine_A); })
      .def_property_readonly("offset", [](const Fit& fit) { return or_none(fit.offset); })
      .def_readonly("alpha_star", &Fit::alpha_star)
      .def_readonly("residual", &Fit::residual)
      .def_readonly("affine_residual", &Fit::affine_residual)
      .def_readonly("rows", &Fit::rows)
      .def_readonly("refine_steps", &Fit::refine_steps)
      .def(py::pickle(
          [](const Fit& f) {
            return py::make_tuple(f.A, or_none(f.B), or_none(f.affine_A), or_none(f.offset),
                                  f.alpha_star, f.residual, f.affine_residual, f.rows,
                                  f.refine_steps);
          },
          [](const py::tuple& s) {
            return fit_from(s[0].cast<Tensor>(), s[1].cast<MaybeTensor>(), s[2].cast<MaybeTensor>(),
                            s[3].cast<MaybeTensor>(), s[4].cast<double>(), s[5].cast<double>(),
                            s[6].cast<double>(), s[7].cast<int64_t>(), s[8].cast<int64_t>());
          }));
}

void bind_sums(py::module_& m) {
  py::class_<FitSums>(m, "FitSums", "What a fit is solved from, fp64.")
      .def(py::init(&sums_from), py::arg("xx"), py::arg("vx"), py::arg("x_sum"), py::arg("v_sum"),
           py::arg("vv"), py::arg("rows"))
      .def_readonly("xx", &FitSums::xx)
      .def_readonly("vx", &FitSums::vx)
      .def_readonly("x_sum", &FitSums::x_sum)
      .def_readonly("v_sum", &FitSums::v_sum)
      .def_readonly("vv", &FitSums::vv)
      .def_readonly("rows", &FitSums::rows)
      .def(py::pickle(
          [](const FitSums& f) {
            return py::make_tuple(f.xx, f.vx, f.x_sum, f.v_sum, f.vv, f.rows);
          },
          [](const py::tuple& s) {
            return sums_from(s[0].cast<Tensor>(), s[1].cast<Tensor>(), s[2].cast<Tensor>(),
                             s[3].cast<Tensor>(), s[4].cast<double>(), s[5].cast<int64_t>());
          }));
}

void bind_layers(py::module_& m) {
  py::class_<LayerView>(m, "LayerView", "The tensors of one layer of a chain.")
      .def(
          py::init([](const MaybeTensor& weight, const Tensor& A, const Tensor& B,
                      const MaybeTensor& norms, const MaybeTensor& count, const MaybeTensor& bias,
                      const std::optional<Fit>& fit, const MaybeTensor& products) {
            return LayerView{
                or_undefined(weight), A, B, window_from(norms, count, products), or_undefined(bias),
                fit.value_or(Fit())};
          }),
          py::arg("weight"), py::arg("A"), py::arg("B"), py::arg("norms") = std::nullopt,
          py::arg("count") = std::nullopt, py::arg("bias") = std::nullopt,
          py::arg("fit") = std::nullopt, py::arg("products") = std::nullopt);
  py::class_<ChainView>(m, "ChainView", "A chain together with its tensors.")
      .def(py::init([](const Chain& chain, std::vector<LayerView> layers) {
             return ChainView{chain, std::move(layers)};
           }),
           py::arg("chain"), py::arg("layers"));
  py::class_<LayerStatistics>(m, "LayerStatistics", "What is known of one layer.")
      .def(py::init([](const MaybeTensor& norms, const MaybeTensor& count,
                       const std::optional<Fit>& fit, const std::optional<FitSums>& sums,
                       const MaybeTensor& products) {
             return LayerStatistics{window_from(norms, count, products), fit.value_or(Fit()), sums};
           }),
           py::arg("norms") = std::nullopt, py::arg("count") = std::nullopt,
           py::arg("fit") = std::nullopt, py::arg("sums") = std::nullopt,
           py::arg("products") = std::nullopt)
      .def_property_readonly("norms",
                             [](const LayerStatistics& s) { return or_none(s.norms.norms()); })
      .def_property_readonly("count",
                             [](const LayerStatistics& s) { return or_none(s.norms.count()); })
      .def_property_readonly("products",
                             [](const LayerStatistics& s) { return or_none(s.norms.products()); })
      .def_property_readonly("fit", [](const LayerStatistics& s) { return or_none(s.fit); })
      .def_readonly("sums", &LayerStatistics::sums);
}

}  // namespace

void bind_views(py::module_& m) {
  bind_fit(m);
  bind_sums(m);
  bind_layers(m);
}

}  // namespace reslora::python
