// Plans, fits and what is calibrated.
#include <ATen/ops/matmul.h>
#include <reslora/calibration.h>
#include <reslora/merge.h>
#include <reslora/merge_errors.h>
#include <reslora/plain_lora.h>
#include <reslora/regression.h>
#include <reslora/statistics_io.h>

#include <filesystem>
#include <map>

#include "bindings.h"

namespace reslora::python {
namespace {

/// Weight, A, B, norms, count, bias, fit.
using ViewTuple = std::tuple<MaybeTensor, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor,
                             std::optional<Fit>>;
using ChainViewTuple = std::pair<Chain, std::vector<ViewTuple>>;

MaybeTensor or_none(const Tensor& tensor) {
  return tensor.defined() ? MaybeTensor(tensor) : std::nullopt;
}

NormWindow window_from(const MaybeTensor& norms, const MaybeTensor& count) {
  if (!norms.has_value() && !count.has_value()) return {};
  return {or_undefined(norms), or_undefined(count)};
}

ChainView view_from(const ChainViewTuple& chain) {
  ChainView view{chain.first, {}};
  for (const auto& [weight, A, B, norms, count, bias, fit] : chain.second) {
    view.layers.push_back({or_undefined(weight), A, B, window_from(norms, count),
                           or_undefined(bias), fit.value_or(Fit())});
  }
  return view;
}

std::vector<ChainView> views_from(const std::vector<ChainViewTuple>& chains) {
  std::vector<ChainView> views;
  for (const ChainViewTuple& chain : chains) views.push_back(view_from(chain));
  return views;
}

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

std::optional<Fit> or_none(const Fit& fit) {
  return fit.A.defined() ? std::optional<Fit>(fit) : std::nullopt;
}

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
  m.def("solve_fit", &solve_fit, py::arg("sums"), py::arg("A"), py::arg("options"), py::arg("name"),
        NoGil(), "Solve for A' from sums.");
}

void bind_collector(py::module_& m) {
  py::class_<FitCost>(m, "FitCost", "What collecting took.")
      .def_readonly("passes", &FitCost::passes)
      .def_readonly("peak_bytes", &FitCost::peak_bytes)
      .def_readonly("row_file_bytes", &FitCost::row_file_bytes)
      .def_readonly("solver_steps", &FitCost::solver_steps);
  py::class_<FitCollector>(m, "FitCollector", "Sums over calibration batches, and their fits.")
      .def(py::init([](const std::vector<ChainViewTuple>& chains, const FitOptions& options) {
             return FitCollector(views_from(chains), options);
           }),
           py::arg("chains"), py::arg("options"))
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
        "Check the padding masks of a batch and return them as bool.");
  m.def(
      "row_mask",
      [](const std::vector<Tensor>& masks, const std::vector<int64_t>& leading) {
        return row_mask(masks, leading);
      },
      py::arg("masks"), py::arg("leading"), "Return the mask of rows, flat, None without one.");
}

void bind_moves(py::module_& m) {
  m.def(
      "move_taps", [](const ChainViewTuple& chain) { return move_taps(view_from(chain)); },
      py::arg("chain"), NoGil(), "Move half of every tap to the layer whose input it reads.");
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
  m.def(
      "choose_moves",
      [](const std::vector<ChainViewTuple>& c, const MoveMeasure& f) {
        return choose_moves(views_from(c), f);
      },
      py::arg("chains"), py::arg("measure"), NoGil(),
      "Move the taps of those chains whose moved form is nearer to the adapted model.");
  m.def(
      "has_moved_taps", [](const ChainViewTuple& c) { return has_moved_taps(view_from(c)); },
      py::arg("chain"), "Tell whether the taps of a chain were moved.");
  m.def(
      "measured_batches", [] { return kMeasuredBatches; },
      "Return on how many batches moved taps are tried.");
  m.def(
      "few_rows_warning",
      [](const std::vector<ChainViewTuple>& c) { return few_rows_warning(views_from(c)); },
      py::arg("chains"),
      "Return a warning where layers saw fewer rows than they have features, else nothing.");
}

/// Norms, count, fit, sums.
using StatisticsTuple =
    std::tuple<MaybeTensor, MaybeTensor, std::optional<Fit>, std::optional<FitSums>>;

void bind_statistics(py::module_& m) {
  m.def(
      "save_statistics",
      [](const std::filesystem::path& path, const std::string& adapter_sum,
         const std::map<std::string, StatisticsTuple>& statistics) {
        std::map<std::string, LayerStatistics> layers;
        for (const auto& [name, own] : statistics) {
          const auto& [norms, count, fit, sums] = own;
          layers[name] = {window_from(norms, count), fit.value_or(Fit()), sums};
        }
        save_statistics(path.string(), adapter_sum, layers);
      },
      py::arg("path"), py::arg("adapter_sum"), py::arg("statistics"), NoGil(),
      "Write statistics by layer atomically.");
  m.def(
      "load_statistics",
      [](const std::filesystem::path& path, const std::string& adapter_sum) {
        std::map<std::string, StatisticsTuple> layers;
        for (auto& [name, own] : load_statistics(path.string(), adapter_sum)) {
          layers[name] = {or_none(own.norms.norms()), or_none(own.norms.count()),
                          own.fit.A.defined() ? std::optional<Fit>(own.fit) : std::nullopt,
                          own.sums};
        }
        return layers;
      },
      py::arg("path"), py::arg("adapter_sum"), NoGil(), "Read statistics of an adapter.");
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
          "W* - W [out, in].");
  py::class_<MergePlan>(m, "MergePlan", "Plan, apply and revert a merge.")
      .def(py::init([](const std::vector<ChainViewTuple>& chains, const std::string& merge_method,
                       bool use_affine) {
             return MergePlan(views_from(chains), merge_method, use_affine);
           }),
           py::arg("chains"), py::arg("merge_method"), py::arg("use_affine") = true, NoGil())
      .def_property_readonly("layers", &MergePlan::layers)
      .def_property_readonly("fell_back_to_weight", &MergePlan::fell_back_to_weight)
      .def_property_readonly("is_applied", &MergePlan::is_applied)
      .def("apply", &MergePlan::apply, py::arg("keep_originals") = true,
           py::arg("safe_merge") = false, py::arg("progress") = nullptr, NoGil())
      .def(
          "revert",
          [](MergePlan& plan, const std::vector<MaybeTensor>& weights,
             const std::vector<MaybeTensor>& biases) {
            std::vector<Tensor> own;
            std::vector<Tensor> own_biases;
            for (const MaybeTensor& weight : weights) own.push_back(or_undefined(weight));
            for (const MaybeTensor& bias : biases) own_biases.push_back(or_undefined(bias));
            plan.revert(own, own_biases);
          },
          py::arg("weights") = std::vector<MaybeTensor>(),
          py::arg("biases") = std::vector<MaybeTensor>(), NoGil());
}

void bind_errors(py::module_& m) {
  m.def(
      "layer_errors",
      [](const LayerMerge& planned, const Tensor& x, const Tensor& s, const Tensor& y,
         const std::vector<Tensor>& B, const std::vector<double>& scaling,
         const MaybeTensor& weight, const MaybeTensor& mask) {
        const LayerErrors e =
            layer_errors(planned, x, s, y, B, scaling, or_undefined(weight), mask);
        return std::tuple(e.method, e.rounding, e.both, e.whole);
      },
      py::arg("planned"), py::arg("x"), py::arg("s"), py::arg("y"), py::arg("B"),
      py::arg("scaling"), py::arg("weight"), py::arg("mask"), NoGil(),
      "Return squared norms: of the method's error, of rounding, of both, of y.");
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
      "moved",
      [](LayerMerge layer, const std::string& device) {
        layer.A = layer.A.to(at::Device(device));
        layer.B = layer.B.to(at::Device(device));
        return layer;
      },
      py::arg("layer"), py::arg("device"), "Return a planned pair on another device.");
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
  m.def("padded_factors", &padded_factors, py::arg("layer"), py::arg("R"),
        "Pad a planned pair with zeros to rank R.");
  m.def(
      "reduced_factors",
      [](const LayerMerge& layer, int64_t max_rank, double tolerance) {
        ReducedFactors reduced = reduced_factors(layer, max_rank, tolerance);
        return std::pair(std::move(reduced.layer), reduced.error);
      },
      py::arg("layer"), py::arg("max_rank"), py::arg("tolerance"), NoGil(),
      "Reduce a planned pair to the smallest rank within a tolerance; also return the error.");
}

}  // namespace

void bind_merge(py::module_& m) {
  bind_fit(m);
  bind_sums(m);
  bind_solving(m);
  bind_collector(m);
  bind_padding(m);
  bind_moves(m);
  bind_statistics(m);
  bind_plan(m);
  bind_pairs(m);
  bind_errors(m);
}

}  // namespace reslora::python
