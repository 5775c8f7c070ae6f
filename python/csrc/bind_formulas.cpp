// The paper's formulas, for tests and readers.
#include <reslora/formulas.h>

#include "bindings.h"

namespace reslora::python {
namespace {

using BlockTuple = std::tuple<Tensor, MaybeTensor, Tensor, Tensor, double>;

formulas::Block block_from(const BlockTuple& block) {
  const auto& [W, bias, A, B, scaling] = block;
  return {W, or_undefined(bias), A, B, scaling};
}

std::vector<formulas::Block> blocks_from(const std::vector<BlockTuple>& blocks) {
  std::vector<formulas::Block> list;
  for (const BlockTuple& block : blocks) list.push_back(block_from(block));
  return list;
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

void bind_formulas(py::module_& m) {
  bind_forward_formulas(m);
  bind_merge_formulas(m);
}

}  // namespace reslora::python
