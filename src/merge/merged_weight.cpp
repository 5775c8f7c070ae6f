// Merged weights and what is asked of them; see merged_weight.h.
#include "merge/merged_weight.h"

#include <ATen/Functions.h>

#include <cmath>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "cpu/thin_products.h"

namespace reslora::detail {

using at::Tensor;

void check_pair(const LayerMerge& layer, const char* op) {
  const auto is_matrix = [](const Tensor& tensor) {
    return is_dense(tensor) && !tensor.is_meta() && tensor.dim() == 2 &&
           at::isFloatingType(tensor.scalar_type());
  };
  RESLORA_CHECK(is_matrix(layer.A) && is_matrix(layer.B) && layer.A.size(0) == layer.B.size(1) &&
                    layer.A.device() == layer.B.device(),
                "[{}] a layer must have factors A [r, in] and B [out, r], floating point and in "
                "memory; got {} and {} (layer {})",
                op, described(layer.A), described(layer.B), layer.name);
  if (layer.bias.defined())
    check_floating(layer.bias, {layer.B.size(0)}, op, "the bias that is added", layer.name);
}

void check_finite(const LayerMerge& layer, const char* op) {
  RESLORA_CHECK(
      is_finite(layer.A) && is_finite(layer.B) && (!layer.bias.defined() || is_finite(layer.bias)),
      "[{}] an adapter must be finite; got NaN or infinity in layer {}", op, layer.name);
}

void check_weight(const Tensor& weight, const LayerMerge& layer, const char* purpose) {
  check_pair(layer, "merge");
  RESLORA_CHECK(weight.defined(),
                "[merge] {} needs the base weight, and layer {} has none: give it (reslora merge "
                "does), or take another rule (for norms save with statistics)",
                purpose, layer.name);
  const at::ScalarType dtype = weight.scalar_type();
  RESLORA_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "[merge] {} needs a weight of dtype float32, float64, float16 or bfloat16: dequantise "
      "it first; got {} (layer {})",
      purpose, c10::toString(dtype), layer.name);
  RESLORA_CHECK(!weight.is_meta() && weight.layout() == at::kStrided &&
                    !weight.key_set().has(c10::DispatchKey::Python),
                "[merge] {} needs a plain tensor in memory: materialise, gather or dequantise it "
                "first; got {} on {}, maybe of a tensor subclass (layer {})",
                purpose, c10::toString(weight.layout()), weight.device().str(), layer.name);
  RESLORA_CHECK(weight.sizes() == at::IntArrayRef({layer.B.size(0), layer.A.size(1)}),
                "[merge] weight must be [{}, {}]; got [{}] (layer {})", layer.B.size(0),
                layer.A.size(1), fmt::join(weight.sizes(), ", "), layer.name);
}

void add_product_(const Tensor& c, const Tensor& a, const Tensor& b) {
  if (!c.is_cpu() || c.scalar_type() != at::kFloat || (c.stride(0) != 1 && c.stride(1) != 1)) {
    Tensor(c).addmm_(a, b);
    return;
  }
  if (c.stride(1) != 1) return add_product_(c.t(), b.t(), a.t());
  // The kernel reads memory, in which a lazily negated tensor has the other sign.
  const Tensor left = a.contiguous().resolve_neg(), right = b.contiguous().resolve_neg();
  auto* data = c.mutable_data_ptr<float>();
  thin::expand({data, c.stride(0), nullptr, 0, c.size(0), c.size(1)},
               {left.const_data_ptr<float>(), left.size(1)},
               {right.const_data_ptr<float>(), right.size(1)}, right.size(0), {data, c.stride(0)});
}

Tensor unchecked_merged_weight(const Tensor& weight, const LayerMerge& layer) {
  const at::ScalarType dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor merged = weight.detach().to(dtype, /*non_blocking=*/false, /*copy=*/true);
  add_product_(merged, layer.B.to(merged.options()), layer.A.to(merged.options()));
  return merged;
}

double norm_of(const Tensor& matrix) {
  // Rows first and their sum in fp64: an fp32 sum over a large matrix would lose digits.
  const Tensor rows = at::linalg_vector_norm(matrix, 2, at::IntArrayRef{1});
  return at::linalg_vector_norm(rows.to(at::kDouble), 2).item<double>();
}

bool is_finite(const Tensor& matrix) {
  if (matrix.numel() == 0) return true;
  const auto [low, high] = at::aminmax(matrix);  // carries NaN, and needs no matrix of flags
  return std::isfinite(low.item<double>()) && std::isfinite(high.item<double>());
}

}  // namespace reslora::detail
