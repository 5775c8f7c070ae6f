// out = kept (alpha * u P + base) in one write of out.
//
// A block owns 64 rows and 128 columns of out. The product is staged in fp32, so that scale, base,
// mask and rounding happen once, in 16-byte pieces.
#include "dropout.cuh"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;      // one tile for each warp
constexpr int kColumns = 128;  // of out, per block
constexpr int kPitch = kColumns + kPad;
constexpr int kOutPitch = kColumns + 4;

/// Shared memory: the tiles of u and P; afterwards the block's part of out, in fp32.
template <int kRank>
struct Layout {
  static constexpr int kUPitch = kRank + kPad;
  static constexpr int kUTile = kRows * kUPitch;
  static constexpr size_t kTileBytes = size_t{2} * (kUTile + kRank * kPitch);
  static constexpr size_t kOutBytes = size_t{4} * kRows * kOutPitch;
  static constexpr size_t kBytes = kTileBytes > kOutBytes ? kTileBytes : kOutBytes;
  static_assert(kBytes <= kLeastBytes, "every device can start it");
};

template <typename T>
struct Job {
  View<const T> u;
  View<const T> P;
  View<T> out;
  View<const T> base;
  float alpha;
  const uint8_t* bits;
};

/// Writes eight elements of out from their products.
template <typename T>
__device__ void write_chunk(const Job<T>& job, int64_t row, int64_t column, float* values) {
  for (int j = 0; j < kChunk; ++j) values[j] *= job.alpha;
  if (job.base.data != nullptr) {
    Chunk base;
    if (job.base.holds_chunk(column)) {
      RESLORA_READS(job.base.at(row, column), 16);
      base = chunk_at(job.base.at(row, column));
    } else {
      base = load_tail(job.base, row, column);
    }
    for (int k = 0; k < kChunk / 2; ++k) {
      const float2 pair = unpacked<T>(base.pairs[k]);
      values[2 * k] += pair.x;
      values[2 * k + 1] += pair.y;
    }
  }
  Chunk chunk = packed<T>(values);
  if (job.bits != nullptr) {
    const int64_t row_bytes = ceil_div(job.out.columns, kChunk);
    chunk = masked(chunk, mask_of(load(job.bits + row * row_bytes + column / kChunk)));
  }
  store_chunk(job.out, row, column, chunk);
}

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads) expand_kernel(Job<T> job) {
  using L = Layout<kRank>;
  RESLORA_SHARED(memory);
  T* u = reinterpret_cast<T*>(memory);
  T* P = u + L::kUTile;
  const int64_t row = int64_t{blockIdx.x} * kRows, column = int64_t{blockIdx.y} * kColumns;
  const int warp = threadIdx.x / kWarp;
  fetch_tile<OwnChunks<kRows, kRank, kThreads>>(u, job.u, row, 0);
  fetch_tile<OwnChunks<kRank, kColumns, kThreads>>(P, job.P, 0, column);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();

  Accumulator acc[kColumns / kTile];
#pragma unroll
  for (int n = 0; n < kColumns / kTile; ++n) nvcuda::wmma::fill_fragment(acc[n], 0.0f);
  const T* own = u + warp * kTile * L::kUPitch;
  each<kRank / kTile>([&](auto k) {
    LeftTile<T, RowMajor> left;
    load_tile<k * kTile>(left, own, L::kUPitch);
    each<kColumns / kTile>([&](auto n) {
      RightTile<T, RowMajor> right;
      load_tile<k * kTile * kPitch + n * kTile>(right, P, kPitch);
      nvcuda::wmma::mma_sync(acc[n], left, right, acc[n]);
    });
  });
  __syncthreads();  // the tiles become room for the product

  float* rows = reinterpret_cast<float*>(memory) + warp * kTile * kOutPitch;
#pragma unroll
  for (int n = 0; n < kColumns / kTile; ++n)
    nvcuda::wmma::store_matrix_sync(rows + n * kTile, acc[n], kOutPitch,
                                    nvcuda::wmma::mem_row_major);
  __syncwarp();
  for (int i = threadIdx.x % kWarp; i < kTile * kColumns / kChunk; i += kWarp) {
    const int r = i / (kColumns / kChunk), c = i % (kColumns / kChunk) * kChunk;
    const int64_t out_row = row + warp * kTile + r;
    if (out_row < job.out.rows && column + c < job.out.columns)
      write_chunk(job, out_row, column + c, rows + r * kOutPitch + c);
  }
}

template <typename T, int kRank>
struct ExpandLauncher {
  static cudaError_t run(const ExpandArgs& args, cudaStream_t stream) {
    const int64_t row_tiles = ceil_div(args.out.rows, kRows);
    const int64_t column_tiles = ceil_div(args.out.columns, kColumns);
    if (row_tiles == 0 || column_tiles == 0) return cudaSuccess;
    const Job<T> job = {view_of<T>(args.u),    view_of<T>(args.P), view_of<T>(args.out),
                        view_of<T>(args.base), args.alpha,         args.bits};
    const dim3 grid(static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles));
    return start(expand_kernel<T, kRank>, grid, kThreads, Layout<kRank>::kBytes, stream, job);
  }
};

}  // namespace

cudaError_t launch_expand(const ExpandArgs& args, cudaStream_t stream) {
  return dispatch<ExpandLauncher>(args.u.columns, args, stream);
}

}  // namespace reslora::cuda
