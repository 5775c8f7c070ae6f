// Solving for A' from sums, by Cholesky where they are matrices and by conjugate gradients where
// the rows lie in a file; see regression.h.
#include "merge/regression.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/regression.h>

#include <cmath>

#include "core/check.h"
#include "core/precision.h"
#include "core/tensor_checks.h"

namespace reslora {
namespace {

using at::Tensor;

double sum_of(const Tensor& tensor) { return tensor.sum().item<double>(); }

bool is_sum(const Tensor& sum, at::IntArrayRef sizes) {
  return detail::is_dense(sum) && !sum.is_meta() && sum.scalar_type() == at::kDouble &&
         sum.sizes() == sizes;
}

void check_sums(const FitSums& sums, const Tensor& A, const FitOptions& options,
                const std::string& name) {
  RESLORA_CHECK(std::isfinite(options.ridge) && options.ridge > 0,
                "[calibrate] ridge must be a number greater than 0; got {}", options.ridge);
  RESLORA_CHECK(sums.rows > 0,
                "[calibrate] a layer is fitted on the rows that it saw; got none for layer {}: "
                "give batches that reach it, or merge by 'input' or 'weight'",
                name);
  detail::check_floating(A, {detail::kAny, detail::kAny}, "calibrate", "A", name);
  RESLORA_CHECK(
      is_sum(sums.vx, A.sizes()),
      "[calibrate] sums must be fp64 of a layer with A of the same shape; got {} for A {} "
      "(layer {})",
      detail::described(sums.vx), detail::described(A), name);
  RESLORA_CHECK(!(sums.vv < 0),
                "[calibrate] the sum of squares must not be negative; got {} (layer {})", sums.vv,
                name);
  RESLORA_CHECK(std::isfinite(sums.vv) && std::isfinite(sum_of(sums.vx)),
                "[calibrate] activations must be finite; got NaN or infinity (layer {}): check "
                "the batches and the adapter",
                name);
}

/// |v - A' x - offset|_F / |v|_F from the sums, where A' solves the normal equations pulled to A:
/// A' xx = vx + lambda (A - A').
double residual_of(double vv, const Tensor& vx, const Tensor& A, const Tensor& fitted,
                   double lambda) {
  if (vv <= 0) return 0;
  const double fitted_vx = sum_of(fitted * vx);
  const double fitted_square = fitted_vx + lambda * sum_of((A - fitted) * fitted);
  return std::sqrt(std::max(0.0, vv - 2 * fitted_vx + fitted_square) / vv);
}

/// lambda, from the diagonal of sum x x^T.
double lambda_of(const Tensor& diagonal, int64_t rows, double ridge, const std::string& name) {
  const double mean = sum_of(diagonal) / static_cast<double>(rows);
  RESLORA_CHECK(std::isfinite(mean),
                "[calibrate] activations must be finite; got NaN or infinity (layer {}): check the "
                "batches and the adapter",
                name);
  RESLORA_CHECK(std::isfinite(ridge * mean),
                "[calibrate] ridge times the mean square of the inputs must be finite; got "
                "{} times {} (layer {}): lower ridge",
                ridge, mean, name);
  return ridge * mean;
}

/// What a fit is pulled to, and what it makes of the rows.
struct Anchor {
  Tensor A;   // [r, in]
  Tensor xx;  // [r, in], A sum x x^T
};

/// sum c_j A_j: the best factors for the rows and for those that the norms stand for. Without norms
/// they are held by a small share of what the products weigh. `all_xx`: each A_j sum x x^T.
Anchor anchor_of(const std::vector<Tensor>& all, const std::vector<Tensor>& all_xx,
                 const Tensor& vx, const std::vector<double>& known, int64_t rows) {
  const auto count = static_cast<int64_t>(all.size());
  const auto options = at::TensorOptions().dtype(at::kDouble);
  Tensor products = at::zeros({count, count}, options), targets = at::zeros({count}, options);
  Tensor factors = at::zeros({count}, options);
  factors[0] = 1;
  for (int64_t i = 0; i < count; ++i) {
    targets[i] = sum_of(all[i] * vx);
    if (!known.empty()) factors[i] = known[i];
    for (int64_t j = 0; j <= i; ++j) products[i][j] = products[j][i] = sum_of(all_xx[i] * all[j]);
  }
  const Tensor diagonal = products.diagonal();
  const double largest = diagonal.max().item<double>();
  if (largest > 0) {
    const double share = known.empty() ? 1e-3 : kPriorRows / static_cast<double>(rows);
    const Tensor held = at::diag(diagonal * share + 1e-12 * largest);
    factors += at::linalg_solve(products + held, targets - at::mv(products, factors));
  }
  Anchor anchor{at::zeros_like(vx), at::zeros_like(vx)};
  for (int64_t i = 0; i < count; ++i) {
    anchor.A.add_(all[i], factors[i].item<double>());
    anchor.xx.add_(all_xx[i], factors[i].item<double>());
  }
  return anchor;
}

/// A and the others of its anchor; refuses what does not fit.
std::vector<Tensor> factors_of(const Tensor& A, const FitAnchor& anchor,
                               const at::TensorOptions& options, const std::string& name) {
  RESLORA_CHECK(anchor.factors.empty() || anchor.factors.size() == anchor.others.size() + 1,
                "[calibrate] an anchor needs a factor of A and of each other; got {} for {} others "
                "(layer {})",
                anchor.factors.size(), anchor.others.size(), name);
  for (const double factor : anchor.factors)
    RESLORA_CHECK(std::isfinite(factor),
                  "[calibrate] the factors of an anchor must be finite; got {} (layer {})", factor,
                  name);
  std::vector<Tensor> all = {A.detach().to(options)};
  for (const Tensor& other : anchor.others) {
    detail::check_floating(other, A.sizes().vec(), "calibrate", "an A of the anchor", name);
    all.push_back(other.detach().to(options));
  }
  return all;
}

struct Solved {
  Tensor fitted;  // undefined where xx plus ridge is not positive definite
  double residual = 0;
};

/// Solves in fp64; `xx` is overwritten. `all`: A, and what else the anchor is made of.
Solved solve(Tensor xx, const Tensor& vx, double vv, int64_t rows, const std::vector<Tensor>& all,
             const std::vector<double>& known, double ridge, const std::string& name) {
  std::vector<Tensor> all_xx;
  for (const Tensor& own : all) all_xx.push_back(at::mm(own, xx));
  const Tensor diagonal = xx.diagonal();
  const double lambda = lambda_of(diagonal, rows, ridge, name);
  if (lambda <= 0) return {all[0].clone(), residual_of(vv, vx, all[0], all[0], 0)};  // x was 0
  const Anchor anchor = anchor_of(all, all_xx, vx, known, rows);
  const Tensor& A = anchor.A;
  const Tensor rhs = vx - anchor.xx;
  diagonal.add_(lambda);
  const auto [factor, info] = at::linalg_cholesky_ex(xx);
  if (info.item<int>() != 0) return {};
  const Tensor fitted = A + at::cholesky_solve(rhs.t(), factor).t();
  return {fitted, residual_of(vv, vx, A, fitted, lambda)};
}

/// alpha* of A' = (1 + alpha*) A in the least-squares sense: <A xx, v x> over <A xx, A>, minus 1.
double best_alpha(const Tensor& A, const Tensor& A_xx, const Tensor& vx) {
  const double own = sum_of(A_xx * A);
  return own > 0 ? sum_of(A * vx) / own - 1 : 0;
}

}  // namespace

Fit solve_fit(const FitSums& sums, const Tensor& A, const FitOptions& options,
              const std::string& name, const FitAnchor& anchor) {
  const detail::FullPrecision guard;
  check_sums(sums, A, options, name);
  const std::vector<Tensor> all = factors_of(A, anchor, sums.vx.options(), name);
  const auto check = [&](const char* role, const Tensor& sum, std::vector<int64_t> sizes) {
    RESLORA_CHECK(is_sum(sum, sizes) && sum.device() == sums.vx.device(),
                  "[calibrate] {} must be fp64 [{}] on the device of vx; got {} (layer {})", role,
                  fmt::join(sizes, ", "), detail::described(sum), name);
    RESLORA_CHECK(std::isfinite(sum_of(sum)),
                  "[calibrate] activations must be finite; got NaN or infinity (layer {}): check "
                  "the batches and the adapter",
                  name);
  };
  check("xx", sums.xx, {A.size(1), A.size(1)});
  RESLORA_CHECK(
      sums.xx.numel() == 0 || sums.xx.diagonal().min().item<double>() >= 0,
      "[calibrate] the diagonal of xx, sums of squares, must not be negative; got {} (layer "
      "{})",
      sums.xx.diagonal().min().item<double>(), name);
  if (options.affine) {
    check("x_sum", sums.x_sum, {A.size(1)});
    check("v_sum", sums.v_sum, {A.size(0)});
  }
  Fit fit;
  fit.rows = sums.rows;
  fit.alpha_star = best_alpha(all[0], at::mm(all[0], sums.xx), sums.vx);
  const Solved linear =
      solve(sums.xx.clone(), sums.vx, sums.vv, sums.rows, all, anchor.factors, options.ridge, name);
  RESLORA_CHECK(linear.fitted.defined(),
                "[calibrate] the sum of x x^T plus ridge must be positive definite; got one that "
                "is not (layer {}): raise ridge (now {})",
                name, options.ridge);
  const auto dtype = A.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto like = A.options().dtype(dtype).requires_grad(false);
  fit.A = linear.fitted.to(like);
  fit.residual = linear.residual;
  if (!options.affine) return fit;
  const double count = static_cast<double>(sums.rows);
  const Tensor x_mean = sums.x_sum / count, v_mean = sums.v_sum / count;
  const Tensor xx = at::addr(sums.xx, sums.x_sum, x_mean, 1, -1);
  const Tensor vx = at::addr(sums.vx, sums.v_sum, x_mean, 1, -1);
  const double vv = sums.vv - sum_of(sums.v_sum * v_mean);
  const Solved affine = solve(xx, vx, vv, sums.rows, all, anchor.factors, options.ridge, name);
  if (!affine.fitted.defined()) return fit;  // x hardly varies: what is left of it is rounding
  fit.affine_A = affine.fitted.to(like);
  fit.offset = (v_mean - at::mv(affine.fitted, x_mean)).to(like);
  fit.affine_residual = sums.vv > 0 ? affine.residual * std::sqrt(std::max(0.0, vv) / sums.vv) : 0;
  return fit;
}

namespace detail {

Fit solve_rows(const RowSums& sums, RowFile& rows, const Tensor& A, double ridge,
               const std::string& name, const FitAnchor& anchor, int64_t& steps) {
  const FullPrecision guard;
  const FitSums plain{{}, sums.vx, {}, {}, sums.vv, sums.rows};
  check_sums(plain, A, {ridge}, name);
  const Tensor own = A.detach().to(sums.vx.options());
  const double lambda = lambda_of(sums.diagonal, sums.rows, ridge, name);
  Fit fit;
  fit.rows = sums.rows;
  fit.alpha_star = best_alpha(own, sums.ux, sums.vx);
  // What others' A make of the rows is not summed, so the anchor is a multiple of A.
  const bool is_known = anchor.others.empty() && !anchor.factors.empty();
  const std::vector<double> known = is_known ? anchor.factors : std::vector<double>();
  const Anchor start = anchor_of({own}, {sums.ux}, sums.vx, known, sums.rows);
  Tensor step = at::zeros_like(own);  // A' - start, a row of A' at a time in parallel
  if (lambda > 0) {
    const Tensor preconditioner = sums.diagonal + lambda;
    Tensor left = sums.vx - start.xx;
    Tensor z = left / preconditioner;
    Tensor direction = z.clone();
    Tensor rho = (left * z).sum(1, /*keepdim=*/true);
    const double goal = 1e-6 * left.norm().item<double>();
    // The count is a bound, not a tuning: the error falls by a factor each time.
    for (steps = 0; steps < 300 && left.norm().item<double>() > goal; ++steps) {
      Tensor image = direction * lambda;
      const Tensor narrow = direction.to(at::kFloat);
      rows.for_each([&](const Tensor& x) { image.add_(at::mm(at::mm(narrow, x.t()), x)); });
      const Tensor along = (direction * image).sum(1, true).clamp_min(1e-300);
      step.add_(direction * (rho / along));
      left.sub_(image * (rho / along));
      z = left / preconditioner;
      const Tensor next = (left * z).sum(1, true);
      direction = z + direction * (next / rho.clamp_min(1e-300));
      rho = next;
    }
  }
  const Tensor fitted = start.A + step;
  const auto dtype = A.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  fit.A = fitted.to(A.options().dtype(dtype).requires_grad(false));
  fit.residual = residual_of(sums.vv, sums.vx, start.A, fitted, lambda);
  return fit;
}

}  // namespace detail
}  // namespace reslora
