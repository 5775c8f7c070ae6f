// to = alpha * sum of parts + addends, for several small matrices of any type in one launch.
#include "elements.cuh"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 256;

__device__ inline int64_t place_in(const Strided& m, int64_t row, int64_t column) {
  return row * m.row_stride + column * m.column_stride;
}

/// The sum over the parts of an element, in order.
__device__ inline float sum_of_parts(const Piece& piece, int64_t place) {
  float sum = 0.0f;
  if (piece.from.type == Element::kFloat) {  // sums of blocks: many parts, loaded together
    const float* from = static_cast<const float*>(piece.from.data) + place;
#pragma unroll 8
    for (int64_t part = 0; part < piece.parts; ++part) sum += load(from + part * piece.part_stride);
    return sum;
  }
  for (int64_t part = 0; part < piece.parts; ++part)
    sum += load_float(piece.from, place + part * piece.part_stride);
  return sum;
}

/// A row of blocks for each piece; a thread makes one element.
__global__ void __launch_bounds__(kThreads) pieces_kernel(PiecesArgs args) {
  const Piece piece = args.pieces[blockIdx.y];
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= piece.rows * piece.columns) return;
  const int64_t row = i / piece.columns, column = i % piece.columns;
  float value = piece.alpha * sum_of_parts(piece, place_in(piece.from, row, column));
  for (const Strided& addend : piece.addends)
    if (addend.data != nullptr) value += load_float(addend, place_in(addend, row, column));
  store_float(piece.to, place_in(piece.to, row, column), value);
}

}  // namespace

cudaError_t launch_pieces(const PiecesArgs& args, cudaStream_t stream) {
  int64_t most = 0;
  for (int k = 0; k < args.count; ++k) {
    const int64_t size = args.pieces[k].rows * args.pieces[k].columns;
    if (size > most) most = size;
  }
  if (most == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kThreads)),
                  static_cast<unsigned>(args.count));
  return start(pieces_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace reslora::cuda
