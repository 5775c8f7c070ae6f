// Small matrices on CUDA that are stacked, cast, cut apart or added up, several in one launch.
#pragma once

#include <utility>
#include <vector>

#include "cuda/elementwise.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {

bool is_16_bit(const Tensor& x);
/// True for the types of cuda::Element: floats of 16, 32 or 64 bits.
bool has_element(const Tensor& t);
/// The type of a tensor that has one.
cuda::Element element_of(const Tensor& t);
/// t, 2-D, for a kernel that reads it.
cuda::Strided strided(const Tensor& t);

/// Several small matrices that are copied, cast, scaled or added up in one launch.
class Pieces {
 public:
  /// to = alpha * from; addends may follow. The tensors must live until `run`.
  cuda::Piece& add(const Tensor& from, const Tensor& to, double alpha = 1.0);
  /// Launches what was added.
  void run();

 private:
  cuda::PiecesArgs args_;
};

/// A block that a piece can read beside x (floats of 16, 32 or 64 bits, on x's device): the block
/// itself, or a copy.
Tensor readable(const Tensor& block, const Tensor& x);

/// The blocks of A below one another [RA, in], in x's dtype with dense rows.
Tensor stacked_rows(at::TensorList A, const Tensor& x);

/// The blocks of B side by side [out, R], in x's dtype (not fp64) with dense rows, and what s B^T
/// is still to be multiplied with: the scaling, or 1 where the blocks have it.
std::pair<Tensor, double> stacked_columns(at::TensorList B, at::ArrayRef<double> scaling,
                                          const Tensor& x);

/// Cuts a stacked gradient into one for each block, in the block's dtype; block k is multiplied
/// with factors[k], where they are given (not in fp64).
std::vector<Tensor> cut_apart(const Tensor& stacked, at::TensorList blocks, int64_t dim,
                              at::ArrayRef<double> factors = {});

}  // namespace reslora::ops
