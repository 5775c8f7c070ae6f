// The start of a training: random A, and B zero unless it is asked for.
#include <ATen/core/grad_mode.h>
#include <reslora/initial_factors.h>

#include <cmath>

#include "core/check.h"
#include "core/config_options.h"
#include "core/tensor_checks.h"

namespace reslora {
namespace {

/// PyTorch's Kaiming-uniform with a = sqrt(5), as for a linear layer: bound 1 / sqrt(columns).
void fill_uniform(const at::Tensor& matrix) {
  if (matrix.numel() == 0) return;
  const double bound = 1 / std::sqrt(static_cast<double>(matrix.size(1)));
  matrix.uniform_(-bound, bound);
}

}  // namespace

void fill_factors(const at::Tensor& A, const at::Tensor& B, const InitLoraWeights& how) {
  const auto is_matrix = [](const at::Tensor& tensor) {
    return detail::is_dense(tensor) && tensor.dim() == 2 &&
           at::isFloatingType(tensor.scalar_type());
  };
  RESLORA_CHECK(is_matrix(A) && is_matrix(B) && A.size(0) == B.size(1),
                "[fill_factors] A must be [r, in] and B [out, r], floating point; got {} and {}",
                detail::described(A), detail::described(B));
  detail::check_initial(how);
  const at::NoGradGuard no_grad;
  B.zero_();
  if (std::holds_alternative<std::string>(how)) {  // "gaussian"
    A.normal_(0, 1 / static_cast<double>(A.size(0)));
    return;
  }
  fill_uniform(A);
  if (!std::get<bool>(how)) fill_uniform(B);
}

}  // namespace reslora
