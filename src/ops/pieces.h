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
/// A matrix, or a stack of them, for a kernel that reads it.
cuda::Strided strided(const Tensor& t);

/// Several small matrices that are copied, cast, scaled or added up in one launch.
class Pieces {
 public:
  /// to = alpha * from, where `from` is a matrix, or parts of one [parts, rows, columns] that are
  /// added up. `to` may be `from`; it must overlap nothing else.
  void add(const Tensor& from, const Tensor& to, double alpha = 1.0);
  /// Adds a matrix to what was added last.
  void plus(const Tensor& addend);
  /// Launches what was added.
  void run();

 private:
  cuda::PiecesArgs args_;
  Tensor to_;                          // of what was added last
  c10::SmallVector<Tensor, 8> alive_;  // until the launch
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

/// Cuts alpha times a stacked gradient, or the parts that it is the sum of, into a gradient for
/// each block, in the block's dtype; block k is multiplied with factors[k] too, where they are
/// given (no alpha and no factors in fp64). Runs the pieces.
std::vector<Tensor> cut_apart(Pieces& pieces, const Tensor& stacked, at::TensorList blocks,
                              int64_t dim, double alpha = 1.0, at::ArrayRef<double> factors = {});

}  // namespace reslora::ops
