// The formulas of formulas.h, written out as the paper writes them.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/formulas.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/tensor_checks.h"

namespace reslora::formulas {
namespace {

using at::Tensor;

/// True for a dense floating tensor of these sizes, of the dtype and on the device of `like`.
bool fits(const Tensor& tensor, at::IntArrayRef sizes, const Tensor& like) {
  return detail::is_dense(tensor) && tensor.sizes() == sizes &&
         tensor.scalar_type() == like.scalar_type() && tensor.device() == like.device();
}

void check_block(const Block& block) {
  const auto& [W, bias, A, B, scaling] = block;
  const bool are_matrices = detail::is_dense(W) && W.dim() == 2 &&
                            at::isFloatingType(W.scalar_type()) && detail::is_dense(A) &&
                            A.dim() == 2;
  RESLORA_CHECK(
      are_matrices && fits(A, {A.size(0), W.size(1)}, W) && fits(B, {W.size(0), A.size(0)}, W) &&
          (!bias.defined() || fits(bias, {W.size(0)}, W)),
      "[formulas] a block must have W [out, in], A [r, in], B [out, r] and bias [out] or "
      "none, of one floating dtype on one device; got {}, {}, {} and {}",
      detail::described(W), detail::described(A), detail::described(B), detail::described(bias));
}

void check_input(const Block& block, const Tensor& x) {
  check_block(block);
  RESLORA_CHECK(detail::is_dense(x) && x.dim() >= 1 && x.size(-1) == block.W.size(1) &&
                    x.scalar_type() == block.W.scalar_type() && x.device() == block.W.device(),
                "[formulas] x must be [..., {}] in the dtype and on the device of W; got {}",
                block.W.size(1), detail::described(x));
}

/// Demands that blocks n - last to n can be added: features as in block n, or one r.
void check_window(const std::vector<Block>& blocks, int64_t n, int64_t last, bool by_rank) {
  const Block& own = blocks[n];
  for (int64_t k = 0; k <= last; ++k) {
    const Block& other = blocks[n - k];
    check_block(other);
    RESLORA_CHECK(by_rank ? other.A.size(0) == own.A.size(0) : other.W.sizes() == own.W.sizes(),
                  "[formulas] blocks that are added must have {}; got A {}, B {} in block {} and A "
                  "{}, B {} in block {}",
                  by_rank ? "one r" : "the same features", detail::described(own.A),
                  detail::described(own.B), n, detail::described(other.A),
                  detail::described(other.B), n - k);
  }
}

Tensor base(const Block& block, const Tensor& x) {
  const Tensor y = at::matmul(x, block.W.t());
  return block.bias.defined() ? y + block.bias : y;
}

Tensor down(const Block& block, const Tensor& x) { return at::matmul(x, block.A.t()); }

Tensor up(const Block& block, const Tensor& v) {
  return block.scaling * at::matmul(v, block.B.t());
}

Tensor delta(const Block& block) { return block.scaling * at::matmul(block.B, block.A); }

/// The m that layer n can have: clipped to the layers before it, -1 meaning all.
int64_t reach(const std::vector<Block>& blocks, int64_t n, int64_t m) {
  RESLORA_CHECK(n >= 0 && n < static_cast<int64_t>(blocks.size()),
                "[formulas] n must be the index of a block; got {} of {} blocks", n, blocks.size());
  RESLORA_CHECK(m >= -1, "[formulas] m must be -1 (all) or a number of layers; got {}", m);
  return m == -1 ? n : std::min(m, n);
}

}  // namespace

Tensor forward_none(const Block& block, const Tensor& x) {
  check_input(block, x);
  return base(block, x) + up(block, down(block, x));
}

Tensor forward_is(const Block& block, const Tensor& x, const Tensor& x_previous) {
  if (!x_previous.defined()) return forward_none(block, x);
  check_input(block, x);
  RESLORA_CHECK(fits(x_previous, x.sizes(), x), "[formulas] x_previous must be like x, {}; got {}",
                detail::described(x), detail::described(x_previous));
  return base(block, x) + up(block, down(block, x + x_previous));
}

Tensor forward_bs(const std::vector<Block>& blocks, int64_t n, int64_t m, const Tensor& x) {
  const int64_t last = reach(blocks, n, m);
  check_window(blocks, n, last, /*by_rank=*/false);
  check_input(blocks[n], x);
  Tensor y = base(blocks[n], x);
  for (int64_t k = 0; k <= last; ++k) y = y + up(blocks[n - k], down(blocks[n - k], x));
  return y;
}

Tensor forward_ms(const std::vector<Block>& blocks, int64_t n, int64_t m,
                  const std::vector<Tensor>& xs) {
  const int64_t last = reach(blocks, n, m);
  RESLORA_CHECK(static_cast<int64_t>(xs.size()) > n,
                "[formulas] xs must hold the input of every layer up to n = {}; got {} tensors", n,
                xs.size());
  check_window(blocks, n, last, /*by_rank=*/true);
  for (int64_t k = 0; k <= last; ++k) {
    check_input(blocks[n - k], xs[n - k]);
    RESLORA_CHECK(xs[n - k].dim() == xs[n].dim() && xs[n - k].sizes().slice(0, xs[n].dim() - 1) ==
                                                        xs[n].sizes().slice(0, xs[n].dim() - 1),
                  "[formulas] xs must have the same rows; got {} for layer {} and {} for layer {}",
                  detail::described(xs[n]), n, detail::described(xs[n - k]), n - k);
  }
  Tensor v = down(blocks[n], xs[n]);
  for (int64_t k = 1; k <= last; ++k) v = v + down(blocks[n - k], xs[n - k]);
  return base(blocks[n], xs[n]) + up(blocks[n], v);
}

double alpha_star_input(double f_previous, double f_own) {
  RESLORA_CHECK(std::isfinite(f_previous) && f_previous >= 0,
                "[alpha_star] a mean norm must be finite and not negative; got {}", f_previous);
  RESLORA_CHECK(std::isfinite(f_own) && f_own > 0,
                "[alpha_star] the layer's own mean norm must be finite and greater than 0; got {}",
                f_own);
  return f_previous / f_own;
}

double alpha_star_weight(const std::vector<double>& merged_norms, int64_t n, int64_t k) {
  RESLORA_CHECK(k >= 1 && k <= n, "[alpha_star] k must lie in [1, n]; got k = {}, n = {}", k, n);
  RESLORA_CHECK(static_cast<int64_t>(merged_norms.size()) >= n,
                "[alpha_star] merged_norms must hold |W*_j| of every layer before n = {}; got {}",
                n, merged_norms.size());
  if (n - k - 1 < 0) return 1;
  return alpha_star_input(merged_norms[n - k - 1], merged_norms[n - 1]);
}

Tensor merged_none(const Block& block) {
  check_block(block);
  return block.W + delta(block);
}

Tensor merged_is(const Block& block, double alpha_star) {
  check_block(block);
  return block.W + (1 + alpha_star) * delta(block);
}

Tensor merged_bs(const std::vector<Block>& blocks, int64_t n, int64_t m) {
  const int64_t last = reach(blocks, n, m);
  check_window(blocks, n, last, /*by_rank=*/false);
  Tensor merged = blocks[n].W;
  for (int64_t k = 0; k <= last; ++k) merged = merged + delta(blocks[n - k]);
  return merged;
}

Tensor merged_ms_input(const Block& block, const std::vector<double>& alpha_star) {
  check_block(block);
  double factor = 1;
  for (const double alpha : alpha_star) factor += alpha;
  return block.W + factor * delta(block);
}

Tensor merged_ms_weight(const std::vector<Block>& blocks, int64_t n,
                        const std::vector<double>& alpha_star) {
  const int64_t m = static_cast<int64_t>(alpha_star.size());
  RESLORA_CHECK(reach(blocks, n, m) == m,
                "[formulas] alpha_star must have at most one entry per earlier layer; got {} for "
                "layer {}",
                m, n);
  check_window(blocks, n, m, /*by_rank=*/true);
  for (int64_t k = 1; k <= m; ++k)
    RESLORA_CHECK(blocks[n - k].A.sizes() == blocks[n].A.sizes(),
                  "[formulas] A that are added must have one shape; got {} in block {} and {} in "
                  "block {}",
                  detail::described(blocks[n].A), n, detail::described(blocks[n - k].A), n - k);
  Tensor A = blocks[n].A;
  for (int64_t k = 1; k <= m; ++k) A = A + alpha_star[k - 1] * blocks[n - k].A;
  return blocks[n].W + blocks[n].scaling * at::matmul(blocks[n].B, A);
}

}  // namespace reslora::formulas
