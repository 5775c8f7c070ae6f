// ds = alpha * gy B and dB = alpha * gy^T s in one read of gy.
//
// A block owns a span of columns of gy and a range of its rows, through which it walks 16 at a
// time. Its part of dB stays in registers; each step's part of ds is added up over the warps and
// written. Two kernels then add up ds over the spans and dB over the ranges, in order.
#include "device.cuh"

namespace reslora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kTile;  // of gy and s per step
constexpr int kStages = 3;

/// Shared memory: the block's rows of B, a ring of tiles of gy and s, and each warp's part of ds;
/// afterwards a tile of dB for each warp.
template <int kRank>
struct Layout {
  static constexpr int kColumns = kRank <= 32 ? 512 : 128 * 128 / kRank;  // of gy, per block
  static constexpr int kOwn = kColumns / kWarps;                          // of them, per warp
  static constexpr int kGyPitch = kColumns + kPad;
  static constexpr int kGyTile = kRows * kGyPitch;
  static constexpr int kPitch = kRank + kPad;  // of B and s
  static constexpr int kBTile = kColumns * kPitch;
  static constexpr int kSTile = kRows * kPitch;
  static constexpr int kDsPitch = kRank + 4;
  static constexpr int kDsTile = kRows * kDsPitch;
  static constexpr size_t kBytes =
      size_t{2} * (kBTile + kStages * (kGyTile + kSTile)) + size_t{4} * kWarps * kDsTile;
};

template <typename T>
struct Job {
  View<const T> gy;
  View<const T> B;
  View<const T> s;
  Partials ds;    // a part for each span of columns
  Partials dB;    // a part for each range of rows
  int64_t range;  // steps of one block
};

/// The warp's columns of the tile of gy: its part of ds goes to memory, its part of dB to `dB`.
template <int kRank, typename T>
__device__ void multiply(const T* gy, const T* B, const T* s, Accumulator (*dB)[kRank / kTile],
                         float* memory) {
  using L = Layout<kRank>;
  const int own = threadIdx.x / kWarp * L::kOwn;
  Accumulator ds[kRank / kTile];
#pragma unroll
  for (int n = 0; n < kRank / kTile; ++n) nvcuda::wmma::fill_fragment(ds[n], 0.0f);
#pragma unroll
  for (int k = 0; k < L::kOwn / kTile; ++k) {
    const T* tile = gy + own + k * kTile;
    LeftTile<T, RowMajor> rows;
    LeftTile<T, ColumnMajor> columns;
    nvcuda::wmma::load_matrix_sync(rows, tile, L::kGyPitch);
    nvcuda::wmma::load_matrix_sync(columns, tile, L::kGyPitch);
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n) {
      RightTile<T, RowMajor> right;
      nvcuda::wmma::load_matrix_sync(right, B + (own + k * kTile) * L::kPitch + n * kTile,
                                     L::kPitch);
      nvcuda::wmma::mma_sync(ds[n], rows, right, ds[n]);
      nvcuda::wmma::load_matrix_sync(right, s + n * kTile, L::kPitch);
      nvcuda::wmma::mma_sync(dB[k][n], columns, right, dB[k][n]);
    }
  }
  float* to = memory + threadIdx.x / kWarp * L::kDsTile;
#pragma unroll
  for (int n = 0; n < kRank / kTile; ++n)
    nvcuda::wmma::store_matrix_sync(to + n * kTile, ds[n], L::kDsPitch,
                                    nvcuda::wmma::mem_row_major);
}

/// Adds a step's ds up over the warps and writes it.
template <int kRank, typename T>
__device__ void write_ds(const Job<T>& job, int64_t first_row, const float* memory) {
  using L = Layout<kRank>;
  for (int i = threadIdx.x; i < kRows * kRank; i += kThreads) {
    const int r = i / kRank, c = i % kRank;
    if (first_row + r >= job.ds.rows || c >= job.ds.columns) continue;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum += memory[warp * L::kDsTile + r * L::kDsPitch + c];
    store(job.ds.at(blockIdx.x, first_row + r) + c, sum);
  }
}

/// Writes the warp's part of dB, 16 rows at a time through its own tile of memory.
template <int kRank, typename T>
__device__ void write_dB(const Job<T>& job, int64_t first_row,
                         const Accumulator (*dB)[kRank / kTile], float* memory) {
  using L = Layout<kRank>;
  const int warp = threadIdx.x / kWarp;
  float* tile = memory + warp * L::kDsTile;
#pragma unroll
  for (int k = 0; k < L::kOwn / kTile; ++k) {
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n)
      nvcuda::wmma::store_matrix_sync(tile + n * kTile, dB[k][n], L::kDsPitch,
                                      nvcuda::wmma::mem_row_major);
    __syncwarp();
    for (int i = threadIdx.x % kWarp; i < kTile * kRank; i += kWarp) {
      const int r = i / kRank, c = i % kRank;
      const int64_t row = first_row + warp * L::kOwn + k * kTile + r;
      if (row < job.dB.rows && c < job.dB.columns)
        store(job.dB.at(blockIdx.y, row) + c, tile[r * L::kDsPitch + c]);
    }
    __syncwarp();  // the tile is used again
  }
}

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads) expand_grad_kernel(Job<T> job) {
  using L = Layout<kRank>;
  RESLORA_SHARED(memory);
  T* B = reinterpret_cast<T*>(memory);
  T* gy_tiles = B + L::kBTile;
  T* s_tiles = gy_tiles + kStages * L::kGyTile;
  float* ds = reinterpret_cast<float*>(s_tiles + kStages * L::kSTile);
  const int64_t column = int64_t{blockIdx.x} * L::kColumns;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int64_t steps = smaller(job.range, ceil_div(job.gy.rows, kRows) - first);

  const auto fetch = [&](int64_t step) {
    const int slot = static_cast<int>(step % kStages);
    const int64_t row = (first + step) * kRows;
    fetch_tile<kRows, L::kColumns, kThreads>(gy_tiles + slot * L::kGyTile, job.gy, row, column);
    fetch_tile<kRows, kRank, kThreads>(s_tiles + slot * L::kSTile, job.s, row, 0);
  };
  Accumulator dB[L::kOwn / kTile][kRank / kTile];
#pragma unroll
  for (int k = 0; k < L::kOwn / kTile; ++k) {
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n) nvcuda::wmma::fill_fragment(dB[k][n], 0.0f);
  }

  fetch_tile<L::kColumns, kRank, kThreads>(B, job.B, column, 0);  // complete with the first step
  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t slot = step % kStages;
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // the tiles are whole; the slot of the step before and its ds are free
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    __pipeline_commit();
    multiply<kRank>(gy_tiles + slot * L::kGyTile, B, s_tiles + slot * L::kSTile, dB, ds);
    __syncthreads();  // every warp's part of ds is there
    write_ds<kRank>(job, (first + step) * kRows, ds);
  }
  __pipeline_wait_prior(0);  // with no rows, B is still on its way
  __syncthreads();           // the room of ds becomes room for dB
  write_dB<kRank>(job, column, dB, ds);
}

/// Spans of columns times ranges of rows.
template <int kRank>
Cut cut_for(const ExpandGradArgs& args) {
  const int64_t spans = ceil_div(args.gy.columns, Layout<kRank>::kColumns);
  const int64_t steps = ceil_div(args.gy.rows, kRows);
  // At least eight steps for a block: each range costs a write and a read of dB in fp32.
  return cut_into(spans, steps, ranges_for(2 * spans, steps / 8, args.multiprocessors));
}

Cut cut_of(const ExpandGradArgs& args) {
  const int64_t rank = args.s.columns;
  if (rank <= 16) return cut_for<16>(args);
  if (rank <= 32) return cut_for<32>(args);
  return rank <= 64 ? cut_for<64>(args) : cut_for<128>(args);
}

template <typename T, int kRank>
struct ExpandGradLauncher {
  static cudaError_t run(const ExpandGradArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    auto* sums = static_cast<float*>(args.workspace);
    const Partials ds = {sums, cut.tiles, args.ds.rows, args.ds.columns};
    const Partials dB = {ds.at(cut.tiles, 0), cut.ranges, args.dB.rows, args.dB.columns};
    if (cut.tiles > 0) {
      const Job<T> job = {
          view_of<T>(args.gy), view_of<T>(args.B), view_of<T>(args.s), ds, dB, cut.range};
      const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.ranges));
      const cudaError_t error =
          start(expand_grad_kernel<T, kRank>, grid, kThreads, Layout<kRank>::kBytes, stream, job);
      if (error != cudaSuccess) return error;
    }
    const cudaError_t error = start_sum(ds, view_of<T>(args.ds), args.alpha, stream);
    return error == cudaSuccess ? start_sum(dB, view_of<T>(args.dB), args.alpha, stream) : error;
  }
};

}  // namespace

size_t workspace_bytes(const ExpandGradArgs& args) {
  const Cut cut = cut_of(args);
  return sizeof(float) *
         (cut.tiles * args.ds.rows * args.ds.columns + cut.ranges * args.dB.rows * args.dB.columns);
}

cudaError_t launch_expand_grad(const ExpandGradArgs& args, cudaStream_t stream) {
  return dispatch<ExpandGradLauncher>(args.s.columns, args, stream);
}

}  // namespace reslora::cuda
