// The formulas of formulas.h, written out as the paper writes them.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <reslora/formulas.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace reslora::formulas {
namespace {

using at::Tensor;

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
  return base(block, x) + up(block, down(block, x));
}

Tensor forward_is(const Block& block, const Tensor& x, const Tensor& x_previous) {
  if (!x_previous.defined()) return forward_none(block, x);
  return base(block, x) + up(block, down(block, x + x_previous));
}

Tensor forward_bs(const std::vector<Block>& blocks, int64_t n, int64_t m, const Tensor& x) {
  const int64_t last = reach(blocks, n, m);
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

Tensor merged_none(const Block& block) { return block.W + delta(block); }

Tensor merged_is(const Block& block, double alpha_star) {
  return block.W + (1 + alpha_star) * delta(block);
}

Tensor merged_bs(const std::vector<Block>& blocks, int64_t n, int64_t m) {
  const int64_t last = reach(blocks, n, m);
  Tensor merged = blocks[n].W;
  for (int64_t k = 0; k <= last; ++k) merged = merged + delta(blocks[n - k]);
  return merged;
}

Tensor merged_ms_input(const Block& block, const std::vector<double>& alpha_star) {
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
  Tensor A = blocks[n].A;
  for (int64_t k = 1; k <= m; ++k) A = A + alpha_star[k - 1] * blocks[n - k].A;
  return blocks[n].W + blocks[n].scaling * at::matmul(blocks[n].B, A);
}

}  // namespace reslora::formulas
