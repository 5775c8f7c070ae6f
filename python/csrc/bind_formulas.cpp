// The paper's formulas, for tests and readers.
#include <reslora/formulas.h>

#include "bindings.h"

namespace reslora::python {
namespace {

using formulas::Block;

void bind_block(py::module_& m) {
  py::class_<Block>(m, "Block",
                    "One adapted layer of a chain: W [out, in], bias [out], A [r, in], B [out, r].")
      .def(py::init([](const Tensor& W, const MaybeTensor& bias, const Tensor& A, const Tensor& B,
                       double scaling) {
             return Block{W, or_undefined(bias), A, B, scaling};
           }),
           py::arg("W"), py::arg("bias"), py::arg("A"), py::arg("B"), py::arg("scaling"))
      .def_readonly("W", &Block::W)
      .def_property_readonly("bias", [](const Block& block) { return or_none(block.bias); })
      .def_readonly("A", &Block::A)
      .def_readonly("B", &Block::B)
      .def_readonly("scaling", &Block::scaling);
}

void bind_forward_formulas(py::module_& m) {
  namespace f = reslora::formulas;
  m.def("forward_none", &f::forward_none, py::arg("block"), py::arg("x"), NoGil());
  m.def(
      "forward_is",
      [](const Block& block, const Tensor& x, const MaybeTensor& x_previous) {
        return f::forward_is(block, x, or_undefined(x_previous));
      },
      py::arg("block"), py::arg("x"), py::arg("x_previous"), NoGil());
  m.def("forward_bs", &f::forward_bs, py::arg("blocks"), py::arg("n"), py::arg("m"), py::arg("x"),
        NoGil());
  m.def("forward_ms", &f::forward_ms, py::arg("blocks"), py::arg("n"), py::arg("m"), py::arg("xs"),
        NoGil());
}

void bind_merge_formulas(py::module_& m) {
  namespace f = reslora::formulas;
  m.def("alpha_star_input", &f::alpha_star_input, py::arg("f_previous"), py::arg("f_own"));
  m.def("alpha_star_weight", &f::alpha_star_weight, py::arg("merged_norms"), py::arg("n"),
        py::arg("k"));
  m.def("merged_none", &f::merged_none, py::arg("block"), NoGil());
  m.def("merged_is", &f::merged_is, py::arg("block"), py::arg("alpha_star"), NoGil());
  m.def("merged_bs", &f::merged_bs, py::arg("blocks"), py::arg("n"), py::arg("m"), NoGil());
  m.def("merged_ms_input", &f::merged_ms_input, py::arg("block"), py::arg("alpha_star"), NoGil());
  m.def("merged_ms_weight", &f::merged_ms_weight, py::arg("blocks"), py::arg("n"),
        py::arg("alpha_star"), NoGil());
}

}  // namespace

void bind_formulas(py::module_& m) {
  bind_block(m);
  bind_forward_formulas(m);
  bind_merge_formulas(m);
}

}  // namespace reslora::python
