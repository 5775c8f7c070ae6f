// The norms that a merge needs: of x and u in one forward, and their place in the ring.
#include <cmath>

#include "elements.cuh"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 1024;  // one block: u is small, and its sum keeps a fixed order

__global__ void __launch_bounds__(kThreads, 1) norms_kernel(NormsArgs args) {
  RESLORA_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);
  float own = 0.0f;
  for (int64_t i = threadIdx.x; i < args.squares_count; i += kThreads)
    own += load(args.squares + i);
  const float of_x = sqrtf(block_sum<kThreads>(own, sums));
  for (int g = 0; g < args.count; ++g) {
    const int64_t columns = args.columns[g], size = args.rows * columns;
    own = 0.0f;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      const float value =
          load_float(args.u, i / columns * args.u.row_stride + args.first[g] + i % columns);
      own += value * value;
    }
    const float sum = block_sum<kThreads>(own, sums);
    if (threadIdx.x != 0) continue;
    store(args.out + 2 * g, of_x);
    store(args.out + 2 * g + 1, sqrtf(sum));
  }
}

__global__ void __launch_bounds__(kWarp) record_kernel(RecordArgs args) {
  if (threadIdx.x != 0) return;
  const int64_t written = load(args.written);
  const int64_t column = (written % args.size + args.size) % args.size;
  store(args.ring + column, load(args.norms));
  store(args.ring + args.size + column, load(args.norms + 1));
  store(args.written, written + 1);
}

}  // namespace

cudaError_t launch_norms(const NormsArgs& args, cudaStream_t stream) {
  if (args.count == 0) return cudaSuccess;
  return start(norms_kernel, dim3(1), kThreads, kThreads / kWarp * sizeof(float), stream, args);
}

cudaError_t launch_record(const RecordArgs& args, cudaStream_t stream) {
  return start(record_kernel, dim3(1), kWarp, 0, stream, args);
}

}  // namespace reslora::cuda
