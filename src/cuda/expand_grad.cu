// ds = gy B and dB = gy^T s in one read of gy.
//
// A block owns a span of columns of gy and a range of its rows, through which it walks 16 at a
// time. Its part of dB stays in registers; each step's part of ds is added up over the warps and
// written. So each span leaves a part of ds, and each range a part of dB.
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = kTile;             // of gy and s per step
constexpr int kColumns = 512;            // of gy, per block
constexpr int kOwn = kColumns / kWarps;  // of them, per warp

/// Shared memory: the block's rows of B, a ring of tiles of gy and s, and each warp's part of ds;
/// afterwards a tile of dB for each warp.
template <int kRank>
struct Layout {
  static constexpr int kGyPitch = kColumns + kPad;
  static constexpr int kGyTile = kRows * kGyPitch;
  static constexpr int kPitch = kRank + kPad;  // of B and s
  static constexpr int kBTile = kColumns * kPitch;
  static constexpr int kSTile = kRows * kPitch;
  static constexpr int kDsPitch = kRank + 4;
  static constexpr int kDsTile = kRows * kDsPitch;

  static constexpr size_t bytes(int stages) {
    return size_t{2} * (kBTile + stages * (kGyTile + kSTile)) + size_t{4} * kWarps * kDsTile;
  }
  static_assert(bytes(2) <= kLeastBytes, "every device can start it");
};

template <typename T>
struct Job {
  View<const T> gy;
  View<const T> B;
  View<const T> s;
  Parts ds;       // one for each span of columns
  Parts dB;       // one for each range of rows
  int64_t range;  // steps of one block
};

/// The warp's columns of the tile of gy: its part of ds goes to memory, its part of dB to `dB`.
template <int kRank, typename T>
__device__ void multiply(const T* gy, const T* B, const T* s, Accumulator (*dB)[kRank / kTile],
                         float* memory) {
  using L = Layout<kRank>;
  const int own = threadIdx.x / kWarp * kOwn;
  gy += own;
  B += own * L::kPitch;
  Accumulator ds[kRank / kTile];
  RightTile<T, RowMajor> entered[kRank / kTile];
  each<kRank / kTile>([&](auto n) {
    nvcuda::wmma::fill_fragment(ds[n], 0.0f);
    load_tile<n * kTile>(entered[n], s, L::kPitch);
  });
  each<kOwn / kTile>([&](auto k) {
    LeftTile<T, RowMajor> rows;
    LeftTile<T, ColumnMajor> columns;
    load_tile<k * kTile>(rows, gy, L::kGyPitch);
    load_tile<k * kTile>(columns, gy, L::kGyPitch);
    each<kRank / kTile>([&](auto n) {
      RightTile<T, RowMajor> right;
      load_tile<k * kTile * L::kPitch + n * kTile>(right, B, L::kPitch);
      nvcuda::wmma::mma_sync(ds[n], rows, right, ds[n]);
      nvcuda::wmma::mma_sync(dB[k][n], columns, entered[n], dB[k][n]);
    });
  });
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
#pragma unroll
  for (int first = 0; first < kRows * kRank; first += kThreads) {
    const int i = first + threadIdx.x, r = i / kRank, c = i % kRank;
    if (first_row + r >= job.gy.rows || c >= job.s.columns) continue;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sum += memory[warp * L::kDsTile + r * L::kDsPitch + c];
    store(row_of(job.ds, blockIdx.x, first_row + r) + c, sum);
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
  for (int k = 0; k < kOwn / kTile; ++k) {
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n)
      nvcuda::wmma::store_matrix_sync(tile + n * kTile, dB[k][n], L::kDsPitch,
                                      nvcuda::wmma::mem_row_major);
    __syncwarp();
    for (int i = threadIdx.x % kWarp; i < kTile * kRank; i += kWarp) {
      const int r = i / kRank, c = i % kRank;
      const int64_t row = first_row + warp * kOwn + k * kTile + r;
      if (row < job.gy.columns && c < job.s.columns)
        store(row_of(job.dB, blockIdx.y, row) + c, tile[r * L::kDsPitch + c]);
    }
    __syncwarp();  // the tile is used again
  }
}

/// Two blocks fit a multiprocessor, or one where there is no room for three stages.
template <typename T, int kRank, int kStages>
__global__ void __launch_bounds__(kThreads, kStages - 1) expand_grad_kernel(Job<T> job) {
  using L = Layout<kRank>;
  RESLORA_SHARED(memory);
  using OwnGy = OwnChunks<kRows, kColumns, kThreads>;
  using OwnS = OwnChunks<kRows, kRank, kThreads>;
  T* B = reinterpret_cast<T*>(memory);
  T* gy_tiles = B + L::kBTile;
  T* s_tiles = gy_tiles + kStages * L::kGyTile;
  float* ds = reinterpret_cast<float*>(s_tiles + kStages * L::kSTile);
  const int64_t column = int64_t{blockIdx.x} * kColumns;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int steps = static_cast<int>(smaller(job.range, ceil_div(job.gy.rows, kRows) - first));

  const bool is_whole = column + kColumns <= job.gy.columns && job.gy.is_aligned &&
                        job.s.is_aligned && job.s.columns % kChunk == 0;
  const int whole = is_whole ? static_cast<int>(smaller(job.gy.rows / kRows - first, steps)) : 0;
  const bool has_s = OwnS::column() < job.s.columns;
  Reader<OwnGy, false, T> gy_reader(job.gy, first * kRows, column, kRows * job.gy.stride, kRows);
  Reader<OwnS, true, T> s_reader(job.s, first * kRows, 0, kRows * job.s.stride, has_s ? kRows : 0);

  const auto fetch = [&](int step) {
    T* gy = gy_tiles + step % kStages * L::kGyTile;
    T* s = s_tiles + step % kStages * L::kSTile;
    if (step < whole) {
      gy_reader.fetch(gy);
      s_reader.fetch(s);
    } else {
      fetch_tile<OwnGy>(gy, job.gy, (first + step) * kRows, column);
      fetch_tile<OwnS>(s, job.s, (first + step) * kRows, 0);
    }
  };
  Accumulator dB[kOwn / kTile][kRank / kTile];
#pragma unroll
  for (int k = 0; k < kOwn / kTile; ++k) {
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n) nvcuda::wmma::fill_fragment(dB[k][n], 0.0f);
  }

  // Complete with the first step.
  fetch_tile<OwnChunks<kColumns, kRank, kThreads>>(B, job.B, column, 0);
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    const int slot = step % kStages;
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

template <typename T, int kRank>
struct ExpandGradLauncher {
  static cudaError_t run(const ExpandGradArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    if (cut.tiles == 0) return cudaSuccess;
    const Job<T> job = {
        view_of<T>(args.gy), view_of<T>(args.B), view_of<T>(args.s), args.ds, args.dB, cut.range};
    return start_blocks(job, cut, stream);
  }

  /// Three stages, where the device has the shared memory for them; else two.
  static cudaError_t start_blocks(const Job<T>& job, const Cut& cut, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.ranges));
    constexpr size_t kBytes = Layout<kRank>::bytes(3);
    if constexpr (kBytes > kLeastBytes) {
      size_t most = 0;
      const cudaError_t error = most_shared_bytes(&most);
      if (error != cudaSuccess) return error;
      if (kBytes > most)
        return start(expand_grad_kernel<T, kRank, 2>, grid, kThreads, Layout<kRank>::bytes(2),
                     stream, job);
    }
    return start(expand_grad_kernel<T, kRank, 3>, grid, kThreads, kBytes, stream, job);
  }
};

}  // namespace

/// Spans of columns times ranges of rows.
Cut cut_of(const ExpandGradArgs& args) {
  return cut_into(ceil_div(args.gy.columns, kColumns), ceil_div(args.gy.rows, kRows),
                  args.multiprocessors);
}

cudaError_t launch_expand_grad(const ExpandGradArgs& args, cudaStream_t stream) {
  return dispatch<ExpandGradLauncher, kMaxExpandGradRank>(args.s.columns, args, stream);
}

}  // namespace reslora::cuda
