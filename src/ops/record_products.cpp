// `record_products` on every device, by ATen: decaying sums of what enters B, for merging.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "ops/adapt_kernels.h"
#include "ops/norm_ring.h"

namespace reslora::ops {
namespace {

void check_record_products(const Tensor& s, at::TensorList taps, const Tensor& products,
                           double decay) {
  const auto is_of_rows = [&](const Tensor& tensor) {
    return detail::is_dense(tensor) && tensor.dim() >= 1 &&
           at::isFloatingType(tensor.scalar_type()) && tensor.device() == s.device();
  };
  RESLORA_CHECK(is_of_rows(s) && detail::is_dense(products) && products.dim() == 2 &&
                    products.sym_size(0) == 2 * s.sym_size(-1) &&
                    products.sym_size(1) == 2 * s.sym_size(-1) &&
                    products.scalar_type() == at::kFloat && products.device() == s.device(),
                "[record_products] s must be floating [..., r] and products float32 [2r, 2r], on "
                "one device; got {} and {}",
                detail::described(s), detail::described(products));
  for (const Tensor& tap : taps)
    RESLORA_CHECK(is_of_rows(tap) && tap.sym_sizes() == s.sym_sizes(),
                  "[record_products] taps must have the shape of s, {}; got {}",
                  detail::described(s), detail::described(tap));
  RESLORA_CHECK(decay >= 0 && decay <= 1,
                "[record_products] decay must be a number from 0 to 1; got {}", decay);
}

void record_products_aten(const Tensor& s, at::TensorList taps, const Tensor& products,
                          double decay) {
  check_record_products(s, taps, products, decay);
  const Tensor entering = as_matrix(s).to(at::kFloat);
  Tensor own = entering;
  for (const Tensor& tap : taps) own = at::sub(own, as_matrix(tap).to(at::kFloat));
  const Tensor rows = at::cat({entering, own}, 1);
  const std::lock_guard<std::mutex> lock(ring_mutex());
  Tensor sums = products;
  sums.addmm_(rows.t(), rows, decay);
}

/// Tells autograd that the sums were changed in place.
void record_products_inplace_or_view(const Tensor& s, at::TensorList taps, const Tensor& products,
                                     double decay) {
  using Schema = void(const Tensor&, at::TensorList, const Tensor&, double);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reslora::record_products", "")
                             .typed<Schema>();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(s, taps, products, decay);
  }
  if (!products.is_inference()) torch::autograd::impl::bump_version(products);
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, CompositeExplicitAutograd, m) {
  if (is_second_copy()) return;
  m.impl("record_products", record_products_aten);
}

TORCH_LIBRARY_IMPL(reslora, Meta, m) {
  if (is_second_copy()) return;
  m.impl("record_products", check_record_products);
}

TORCH_LIBRARY_IMPL(reslora, Autograd, m) {
  if (is_second_copy()) return;
  // A statistic has no gradient.
  m.impl("record_products", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(reslora, ADInplaceOrView, m) {
  if (is_second_copy()) return;
  m.impl("record_products", record_products_inplace_or_view);
}

}  // namespace reslora::ops
