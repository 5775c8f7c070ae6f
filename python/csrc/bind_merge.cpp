// Plans, finished layers, statistics, and what is written of a plan.
#include <ATen/ops/matmul.h>
#include <reslora/finishing.h>
#include <reslora/merge.h>
#include <reslora/merge_errors.h>
#include <reslora/plain_lora.h>
#include <reslora/statistics_io.h>

#include <filesystem>
#include <map>

#include "bindings.h"

namespace reslora::python {
namespace {

void bind_finish(py::module_& m) {
  py::class_<FinishedLayer>(m, "FinishedLayer", "The plain LoRA that takes a layer's place.")
      .def_readonly("A", &FinishedLayer::A)
      .def_property_readonly("B", [](const FinishedLayer& layer) { return or_none(layer.B); })
      .def_readonly("scaling", &FinishedLayer::scaling);
  m.def("finish_chain", &finish_chain, py::arg("chain"), NoGil(),
        "Return the plain LoRA of every layer of a chain.");
}

void bind_statistics(py::module_& m) {
  m.def(
      "save_statistics",
      [](const std::filesystem::path& path, const std::string& adapter_sum,
         const std::map<std::string, LayerStatistics>& statistics, const std::string& weights_sum) {
        save_statistics(path.string(), adapter_sum, statistics, weights_sum);
      },
      py::arg("path"), py::arg("adapter_sum"), py::arg("statistics"), py::arg("weights_sum") = "",
      NoGil(), "Write statistics by layer atomically.");
  m.def(
      "load_statistics",
      [](const std::filesystem::path& path, const std::string& adapter_sum) {
        return load_statistics(path.string(), adapter_sum);
      },
      py::arg("path"), py::arg("adapter_sum"), NoGil(),
      "Read statistics; those of another adapter are refused.");
}

void bind_plan(py::module_& m) {
  py::class_<LayerMerge>(m, "LayerMerge", "What was decided for one layer: W* = W + B A.")
      .def_readonly("name", &LayerMerge::name)
      .def_property_readonly("rule", [](const LayerMerge& l) { return merge_rule_name(l.rule); })
      .def_readonly("alpha_star", &LayerMerge::alpha_star)
      .def_readonly("A", &LayerMerge::A)
      .def_readonly("B", &LayerMerge::B)
      .def_property_readonly("bias", [](const LayerMerge& l) { return or_none(l.bias); })
      .def_readonly("residual", &LayerMerge::residual)
      .def(
          "delta", [](const LayerMerge& l) { return at::matmul(l.B, l.A); }, NoGil(),
          "Return W* - W [out, in].")
      .def("singular_values", &singular_values, NoGil(),
           "Return the singular values of W* - W, largest first, fp64 [R] on the CPU.");
  py::class_<MergePlan>(m, "MergePlan", "Plan, apply and revert a merge.")
      .def(py::init([](const std::vector<ChainView>& chains, const std::string& merge_method,
                       bool use_affine) { return MergePlan(chains, merge_method, use_affine); }),
           py::arg("chains"), py::arg("merge_method"), py::arg("use_affine") = true, NoGil())
      .def_property_readonly("layers", &MergePlan::layers)
      .def_property_readonly("fell_back_to_weight", &MergePlan::fell_back_to_weight)
      .def_property_readonly("is_applied", &MergePlan::is_applied)
      .def_property_readonly("done", &MergePlan::done)
      .def("apply", &MergePlan::apply, py::arg("keep_originals") = true,
           py::arg("safe_merge") = false, py::arg("progress") = nullptr, NoGil())
      .def(
          "go_on_with",
          [](MergePlan& plan, const std::vector<MaybeTensor>& weights,
             const std::vector<MaybeTensor>& biases) {
            plan.go_on_with(or_undefined(weights), or_undefined(biases));
          },
          py::arg("weights"), py::arg("biases"), NoGil())
      .def(
          "revert",
          [](MergePlan& plan, const std::vector<MaybeTensor>& weights,
             const std::vector<MaybeTensor>& biases) {
            plan.revert(or_undefined(weights), or_undefined(biases));
          },
          py::arg("weights") = std::vector<MaybeTensor>(),
          py::arg("biases") = std::vector<MaybeTensor>(), NoGil());
}

void bind_errors(py::module_& m) {
  py::class_<LayerErrors>(
      m, "LayerErrors",
      "Squared norms of one call: of the method's error, of rounding, of both, of y.")
      .def(py::init([](double method, double rounding, double both, double whole) {
             return LayerErrors{method, rounding, both, whole};
           }),
           py::arg("method"), py::arg("rounding"), py::arg("both"), py::arg("whole"))
      .def_readonly("method", &LayerErrors::method)
      .def_readonly("rounding", &LayerErrors::rounding)
      .def_readonly("both", &LayerErrors::both)
      .def_readonly("whole", &LayerErrors::whole);
  m.def(
      "layer_errors",
      [](const LayerMerge& planned, const Tensor& x, const Tensor& s, const Tensor& y,
         const std::vector<Tensor>& B, const std::vector<double>& scaling,
         const MaybeTensor& weight, const MaybeTensor& mask) {
        return layer_errors(planned, x, s, y, B, scaling, or_undefined(weight), mask);
      },
      py::arg("planned"), py::arg("x"), py::arg("s"), py::arg("y"), py::arg("B"),
      py::arg("scaling"), py::arg("weight"), py::arg("mask"), NoGil(),
      "Compare one call of an unmerged layer with its planned pair.");
  m.def(
      "merged_forward",
      [](const LayerMerge& planned, const Tensor& x, const Tensor& weight,
         const MaybeTensor& bias) {
        return merged_forward(planned, x, weight, or_undefined(bias));
      },
      py::arg("planned"), py::arg("x"), py::arg("weight"), py::arg("bias"), NoGil(),
      "Return y of the merged layer.");
}

void bind_pairs(py::module_& m) {
  m.def(
      "save_plain_lora",
      [](const std::filesystem::path& folder, const std::vector<LayerMerge>& layers,
         const std::map<std::string, Tensor>& heads, const std::vector<std::string>& target_modules,
         const std::vector<std::string>& modules_to_save, bool fan_in_fan_out,
         const std::string& base_model_name_or_path, const std::string& task_type,
         const std::string& revision) {
        return save_plain_lora(folder.string(),
                               {layers, heads, target_modules, modules_to_save, fan_in_fan_out,
                                base_model_name_or_path, task_type, revision});
      },
      py::arg("folder"), py::arg("layers"), py::arg("heads"), py::arg("target_modules"),
      py::arg("modules_to_save"), py::arg("fan_in_fan_out"), py::arg("base_model_name_or_path"),
      py::arg("task_type"), py::arg("revision"), NoGil(),
      "Write a plain LoRA in PEFT's format, padded to the largest rank, which is returned.");
  m.def("rank_warning", &rank_warning, py::arg("rank"), py::arg("tolerance"), py::arg("worst"),
        "Return a warning where reduced pairs lost more than a tolerance, else \"\".");
  m.def("padded_factors", &padded_factors, py::arg("layer"), py::arg("R"),
        "Pad a planned pair with zeros to A [R, in], B [out, R].");
  m.def(
      "reduced_factors",
      [](const LayerMerge& layer, int64_t max_rank, double tolerance) {
        ReducedFactors reduced = reduced_factors(layer, max_rank, tolerance);
        return std::pair(std::move(reduced.layer), reduced.error);
      },
      py::arg("layer"), py::arg("max_rank"), py::arg("tolerance"), NoGil(),
      "Reduce a pair to the smallest rank within a tolerance; also return the relative error.");
}

}  // namespace

void bind_merge(py::module_& m) {
  bind_finish(m);
  bind_statistics(m);
  bind_plan(m);
  bind_pairs(m);
  bind_errors(m);
}

}  // namespace reslora::python
