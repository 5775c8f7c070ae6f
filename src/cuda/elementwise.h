// CUDA kernels that move, mask or sum up elements, on raw pointers, without torch. None of them
// multiplies matrices; launch.h has those that do.
//
// Contract: as in launch.h. A launch enqueues on `stream`, waits for nothing and returns the first
// error; equal inputs give equal bits. Arithmetic is fp32, and a result is rounded once.
#pragma once

#include "launch.h"

namespace reslora::cuda {

/// The element types of adapters, inputs and gradients.
enum class Element { kFloat, kDouble, kBFloat16, kHalf };

inline int64_t size_of(Element type) {
  return type == Element::kDouble ? 8 : type == Element::kFloat ? 4 : 2;
}

/// Element (i, j) lies at data[i * row_stride + j * column_stride]; strides count elements.
struct Strided {
  const void* data = nullptr;
  Element type = Element::kFloat;
  int64_t row_stride = 0;
  int64_t column_stride = 1;
};

constexpr int kMaxAddends = 2;
constexpr int kMaxPieces = 8;

/// to = alpha * (the sum of `parts` matrices that lie `part_stride` elements apart) + the addends.
/// `to` is written, and may be an addend of its own piece; it must overlap nothing else.
struct Piece {
  Strided from;
  int64_t parts = 1;
  int64_t part_stride = 0;
  Strided addends[kMaxAddends];  // data null: none
  Strided to;
  int64_t rows = 0;
  int64_t columns = 0;
  float alpha = 1.0f;
};

/// Several pieces in one launch: blocks of adapters that are stacked or cut apart, taps that are
/// added, sums over the parts that blocks have left.
struct PiecesArgs {
  Piece pieces[kMaxPieces];
  int count = 0;
};

/// out = kept x, for any type and any number of columns; out may be x. Bits are given or drawn, as
/// in `project`: both draw the same bits for a seed and an offset. Reads x once, writes out once.
struct DropArgs {
  Element type;
  ConstMatrix x;  // [T, in]
  Matrix out;     // [T, in]
  Mask mask;      // not kNone
};

/// out[2 g] = the root of the sum of `squares`, and out[2 g + 1] = the Frobenius norm of some
/// columns of u.
struct NormsArgs {
  const float* squares;  // [squares_count]
  int64_t squares_count;
  Strided u;  // [T, .], 16-bit or fp32
  int64_t rows;
  int64_t first[kMaxPieces];  // the columns of each norm
  int64_t columns[kMaxPieces];
  int count;
  float* out;  // [2 * count]
};

/// ring[:, *written % size] = norms; ++*written.
struct RecordArgs {
  const float* norms;  // [2]
  float* ring;         // [2, size]
  int64_t size;
  int64_t* written;  // [1]
};

cudaError_t launch_pieces(const PiecesArgs& args, cudaStream_t stream);
cudaError_t launch_drop(const DropArgs& args, cudaStream_t stream);
cudaError_t launch_norms(const NormsArgs& args, cudaStream_t stream);
cudaError_t launch_record(const RecordArgs& args, cudaStream_t stream);

}  // namespace reslora::cuda
