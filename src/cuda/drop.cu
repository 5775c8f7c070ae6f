// out = kept x: dropout by itself, for what `project` does not take (fp32, fp64, many rows of A).
#include "dropout.cuh"
#include "elementwise.h"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 256;

/// A thread makes eight elements: those of one byte of bits.
template <typename T, Dropout kDropout>
__global__ void __launch_bounds__(kThreads) drop_kernel(View<const T> x, View<T> out, Mask mask) {
  const int64_t row_bytes = ceil_div(x.columns, kChunk);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= x.rows * row_bytes) return;
  const int64_t row = index / row_bytes, column = index % row_bytes * kChunk;
  uint32_t kept = 0;
  if constexpr (kDropout == Dropout::kDrawn) {
    const auto place = static_cast<uint64_t>(index);
    kept = bits_of(drawn_mask(start_of(mask.philox), place, mask.level)) & 0xffu;
    store(mask.bits + index, static_cast<uint8_t>(kept));
  } else {
    kept = load(mask.bits + index);
  }
  for (int j = 0; j < kChunk && column + j < x.columns; ++j) {
    const bool is_kept = (kept >> j & 1u) != 0;
    store(out.at(row, column + j), is_kept ? load(x.at(row, column + j)) : T(0.0f));
  }
}

template <typename T>
cudaError_t start_drop(const DropArgs& args, cudaStream_t stream) {
  const int64_t bytes = args.x.rows * ceil_div(args.x.columns, kChunk);
  if (bytes == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(bytes, kThreads)));
  auto kernel = args.mask.dropout == Dropout::kDrawn ? drop_kernel<T, Dropout::kDrawn>
                                                     : drop_kernel<T, Dropout::kGiven>;
  return start(kernel, grid, kThreads, 0, stream, view_of<T>(args.x), view_of<T>(args.out),
               args.mask);
}

}  // namespace

cudaError_t launch_drop(const DropArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case Element::kFloat:
      return start_drop<float>(args, stream);
    case Element::kDouble:
      return start_drop<double>(args, stream);
    case Element::kBFloat16:
      return start_drop<bfloat16>(args, stream);
    default:
      return start_drop<half>(args, stream);
  }
}

}  // namespace reslora::cuda
