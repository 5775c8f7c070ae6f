// How blocks and gradients become pieces, and their launch.
#include "ops/pieces.h"

#include <ATen/ATen.h>

#include "ops/fused_kernels.h"

namespace reslora::ops {
namespace {

/// True where a piece can read or write t beside x.
bool is_readable(const Tensor& t, const Tensor& x) {
  return has_element(t) && t.device() == x.device();
}

/// True where a block can be read as it lies, without a copy.
bool is_ready(const Tensor& block, const Tensor& x) {
  return block.scalar_type() == x.scalar_type() && block.device() == x.device() &&
         block.stride(1) == 1;
}

}  // namespace

bool is_16_bit(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

bool has_element(const Tensor& t) {
  return is_16_bit(t) || t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble;
}

cuda::Element element_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return cuda::Element::kFloat;
    case at::kDouble:
      return cuda::Element::kDouble;
    case at::kHalf:
      return cuda::Element::kHalf;
    default:
      return cuda::Element::kBFloat16;
  }
}

cuda::Strided strided(const Tensor& t) {
  return {t.const_data_ptr(), element_of(t), t.stride(-2), t.stride(-1)};
}

void Pieces::add(const Tensor& from, const Tensor& to, double alpha) {
  if (args_.count == cuda::kMaxPieces) run();
  cuda::Piece& piece = args_.pieces[args_.count++];
  piece = {};
  piece.from = strided(from);
  piece.to = strided(to);
  piece.to.data = to.mutable_data_ptr();
  piece.rows = to.size(0), piece.columns = to.size(1);
  piece.alpha = static_cast<float>(alpha);
  if (from.dim() == 3) piece.parts = from.size(0), piece.part_stride = from.stride(0);
  alive_.push_back(from), alive_.push_back(to);
  to_ = to;
}

void Pieces::plus(const Tensor& addend) {
  cuda::Strided* free = args_.pieces[args_.count - 1].addends;
  cuda::Strided* end = free + cuda::kMaxAddends;
  while (free != end && free->data) ++free;
  if (free == end) {
    run();  // what is added next must be there
    add(to_, to_);
    free = args_.pieces[0].addends;
  }
  *free = strided(addend);
  alive_.push_back(addend);
}

void Pieces::run() {
  if (args_.count == 0) return;
  check_launch(cuda::launch_pieces(args_, current_stream()));
  args_.count = 0;
  alive_.clear();
}

Tensor readable(const Tensor& block, const Tensor& x) {
  return is_readable(block, x) ? block : block.to(x.options());
}

Tensor stacked_rows(at::TensorList A, const Tensor& x) {
  if (x.scalar_type() == at::kDouble) return with_dense_rows(stack(A, 0, x));
  if (A.size() == 1 && is_ready(A[0], x)) return A[0];
  Tensor out = at::empty({total_size(A, 0), A[0].size(1)}, x.options());
  Pieces pieces;
  int64_t first = 0;
  for (const Tensor& block : A) {
    pieces.add(readable(block, x), out.narrow(0, first, block.size(0)));
    first += block.size(0);
  }
  pieces.run();
  return out;
}

std::pair<Tensor, double> stacked_columns(at::TensorList B, at::ArrayRef<double> scaling,
                                          const Tensor& x) {
  if (B.size() == 1 && is_ready(B[0], x)) return {B[0], scaling[0]};
  const bool is_same = is_uniform(scaling);
  Tensor out = at::empty({B[0].size(0), total_size(B, 1)}, x.options());
  Pieces pieces;
  int64_t first = 0;
  for (size_t k = 0; k < B.size(); ++k) {
    const Tensor columns = out.narrow(1, first, B[k].size(1));
    pieces.add(readable(B[k], x), columns, is_same ? 1.0 : scaling[k]);
    first += B[k].size(1);
  }
  pieces.run();
  return {out, is_same ? scaling[0] : 1.0};
}

std::vector<Tensor> cut_apart(Pieces& pieces, const Tensor& stacked, at::TensorList blocks,
                              int64_t dim, double alpha, at::ArrayRef<double> factors) {
  const bool is_sum = stacked.dim() == 3;
  std::vector<Tensor> out;
  if (stacked.scalar_type() == at::kDouble) {
    out = unstack(stacked, blocks, dim);
  } else if (blocks.size() == 1 && !is_sum && factors.empty() && is_ready(blocks[0], stacked)) {
    out = {stacked};
  } else {
    int64_t first = 0;
    for (size_t k = 0; k < blocks.size(); ++k) {
      const Tensor& block = blocks[k];
      out.push_back(
          at::empty(block.sizes(), (is_readable(block, stacked) ? block : stacked).options()));
      pieces.add(stacked.narrow(dim + (is_sum ? 1 : 0), first, block.size(dim)), out.back(),
                 factors.empty() ? alpha : alpha * factors[k]);
      first += block.size(dim);
    }
  }
  pieces.run();
  for (size_t k = 0; k < blocks.size(); ++k)
    if (!is_readable(blocks[k], stacked)) out[k] = out[k].to(blocks[k].options());
  return out;
}

}  // namespace reslora::ops
