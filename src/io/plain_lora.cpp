// Planned pairs as files of plain LoRA want them: padded or reduced to a rank, under PEFT's names.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/plain_lora.h>
#include <reslora/stage.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "core/check.h"
#include "core/precision.h"
#include "io/folders.h"
#include "merge/merged_weight.h"
#include "safetensors/json.h"

namespace reslora {
namespace {

void text_or_null(detail::JsonWriter& json, const char* key, const std::string& value) {
  json.key(key);
  if (value.empty()) {
    json.null();
  } else {
    json.string(value);
  }
}

void names_or_null(detail::JsonWriter& json, const char* key,
                   const std::vector<std::string>& names) {
  json.key(key);
  if (names.empty()) {
    json.null();
    return;
  }
  json.begin_array();
  for (const std::string& name : names) json.string(name);
  json.end_array();
}

/// The options of a plain LoRA whose scale is 1; throws c10::ValueError for text that is not UTF-8.
std::string peft_config(const PlainLora& lora, int64_t R) try {
  std::vector<std::string> targets = lora.target_modules;
  if (targets.empty())
    for (const LayerMerge& layer : lora.layers) targets.push_back(layer.name);
  detail::JsonWriter json(2);
  json.begin_object().key("peft_type").string("LORA").key("r").integer(R);
  json.key("lora_alpha").integer(R).key("lora_dropout").number(0).key("bias").string("none");
  names_or_null(json, "target_modules", targets);
  names_or_null(json, "modules_to_save", lora.modules_to_save);
  json.key("fan_in_fan_out").boolean(lora.fan_in_fan_out);
  json.key("inference_mode").boolean(true).key("use_rslora").boolean(false);
  json.key("use_dora").boolean(false).key("rank_pattern").begin_object().end_object();
  json.key("alpha_pattern").begin_object().end_object();
  text_or_null(json, "base_model_name_or_path", lora.base_model_name_or_path);
  text_or_null(json, "revision", lora.revision);
  text_or_null(json, "task_type", lora.task_type);
  return json.end_object().text() + "\n";
} catch (const detail::ContentError& error) {
  C10_THROW_ERROR(ValueError, fmt::format("[export] {}: {}", kConfigName, error.what()));
}

/// Demands a pair that is all of the layer's merge, since files of plain LoRA hold no bias.
void check_plain(const LayerMerge& layer) {
  detail::check_pair(layer, "export");
  detail::check_finite(layer, "export");
  RESLORA_CHECK(!layer.bias.defined(),
                "[export] plain LoRA holds no bias; got that of an affine fit (layer {}): plan "
                "without use_affine, and unmerge a merged model (the linear fit is exported then)",
                layer.name);
}

}  // namespace

std::pair<at::Tensor, at::Tensor> padded_factors(const LayerMerge& layer, int64_t R) {
  check_plain(layer);
  const int64_t rank = layer.A.size(0);
  RESLORA_CHECK(R >= rank, "[merge] R must be at least the layer's rank {}; got {} (layer {})",
                rank, R, layer.name);
  return {at::constant_pad_nd(layer.A, {0, 0, 0, R - rank}),
          at::constant_pad_nd(layer.B, {0, R - rank})};
}

ReducedFactors reduced_factors(const LayerMerge& layer, int64_t max_rank, double tolerance) {
  detail::check_pair(layer, "export");
  RESLORA_CHECK(layer.A.numel() > 0 && layer.B.numel() > 0,
                "[export] factors must not be empty; got A [{}] and B [{}] (layer {})",
                fmt::join(layer.A.sizes(), ", "), fmt::join(layer.B.sizes(), ", "), layer.name);
  RESLORA_CHECK(max_rank >= 1, "[export] rank must be at least 1; got {} (layer {})", max_rank,
                layer.name);
  RESLORA_CHECK(std::isfinite(tolerance) && tolerance >= 0 && tolerance < 1,
                "[export] tolerance must lie in [0, 1); got {} (layer {})", tolerance, layer.name);
  const detail::FullPrecision guard;
  detail::check_finite(layer, "export");
  // B A = Qb (Rb Ra^T) Qa^T: the singular values are those of the small core.
  const auto [q_b, r_b] = at::linalg_qr(layer.B.to(at::kDouble));
  const auto [q_a, r_a] = at::linalg_qr(layer.A.to(at::kDouble).t());
  const auto [u, values, vh] = at::linalg_svd(at::mm(r_b, r_a.t()), /*full_matrices=*/false);
  // left[k]: what is lost, squared, when the k largest are kept; summed from the small end, since
  // the difference of two large sums would lose it.
  const at::Tensor squares = values.square().to(at::kCPU).contiguous();
  std::vector<double> left(squares.size(0) + 1, 0.0);
  for (int64_t k = squares.size(0) - 1; k >= 0; --k) {
    left[k] = left[k + 1] + squares.const_data_ptr<double>()[k];
  }
  const double total = left[0];
  int64_t rank = 1;
  while (rank < std::min<int64_t>(max_rank, squares.size(0)) &&
         left[rank] > tolerance * tolerance * total) {
    ++rank;
  }
  const double lost = left[rank];
  const at::Tensor root = values.narrow(0, 0, rank).sqrt();
  ReducedFactors reduced;
  reduced.layer = layer;
  reduced.layer.B = (at::mm(q_b, u.narrow(1, 0, rank)) * root).to(layer.B.scalar_type());
  reduced.layer.A =
      (root.unsqueeze(1) * at::mm(vh.narrow(0, 0, rank), q_a.t())).to(layer.A.scalar_type());
  reduced.error = total > 0 ? std::sqrt(lost / total) : 0;
  return reduced;
}

std::string rank_warning(int64_t rank, double tolerance, double worst) {
  if (worst <= tolerance) return "";
  return fmt::format(
      "[export] rank {} is too small for the tolerance {:g}: the largest relative error of a "
      "layer's B A is {:.3g}",
      rank, tolerance, worst);
}

int64_t save_plain_lora(const std::string& folder, const PlainLora& lora) {
  RESLORA_CHECK(!lora.layers.empty(), "[export] a plain LoRA must have layers; got none");
  const std::string config = detail::in_folder(folder, kConfigName);
  RESLORA_CHECK(
      detail::file_text(config).find("\"RESLORA\"") == std::string::npos,
      "[export] the folder must not hold an unmerged adapter, which would be lost; got {}", folder);
  int64_t R = 0;
  std::set<std::string> names;
  for (const LayerMerge& layer : lora.layers) {
    check_plain(layer);
    RESLORA_CHECK(names.insert(layer.name).second,
                  "[export] layers must have names of their own; got {} twice", layer.name);
    R = std::max(R, layer.A.size(0));
  }
  const std::string prefix(kModelPrefix);
  TensorFile file;
  file.metadata = {{"format", "pt"}};
  for (const LayerMerge& layer : lora.layers) {
    auto [A, B] = padded_factors(layer, R);
    file.tensors.emplace(prefix + layer.name + ".lora_A.weight", std::move(A));
    file.tensors.emplace(prefix + layer.name + ".lora_B.weight", std::move(B));
  }
  for (const auto& [name, tensor] : lora.heads)
    RESLORA_CHECK(file.tensors.emplace(prefix + name, tensor).second,
                  "[export] trained modules must have names of their own; got {}", name);
  const std::string options = peft_config(lora, R);
  Stage stage(folder);
  save_tensors(stage.path(kWeightsName), file);
  write_text(stage.path(kConfigName), options);
  for (const auto& [name, tensor] : lora.heads)  // which files can hold
    RESLORA_CHECK(!at::isFloatingType(tensor.scalar_type()) || detail::is_finite(tensor),
                  "[export] trained modules must be finite; got NaN or infinity in {}", name);
  stage.commit();
  return R;
}

}  // namespace reslora
