// dA = alpha * du^T kept x in one read of x.
//
// A block owns 64 columns of dA, which it keeps in registers, and a range of rows of x and du,
// through which it walks 64 at a time. A second kernel adds the ranges up in order.
#include "device.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of dA, per block
constexpr int kRows = 64;     // of x and du per step
constexpr int kPitch = kColumns + kPad;
constexpr int kChunksPerThread = kRows * kColumns / kChunk / kThreads;

/// Shared memory: kStages pairs of tiles; afterwards the block's part of dA, in fp32.
template <int kRank>
struct Layout {
  static constexpr int kStages = 3;
  static constexpr int kXTile = kRows * kPitch;
  static constexpr int kDuPitch = kRank + kPad;
  static constexpr int kDuTile = kRows * kDuPitch;
  static constexpr int kSumPitch = kColumns + 4;
  static constexpr size_t kRingBytes = size_t{2} * kStages * (kXTile + kDuTile);
  static constexpr size_t kSumBytes = size_t{4} * kRank * kSumPitch;
  static constexpr size_t kBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
};

template <typename T>
struct Job {
  View<const T> du;
  View<const T> x;
  const uint8_t* bits;
  Partials partials;
  int64_t range;  // steps of one block
};

/// Where chunk i of this thread lies in a tile of x.
__device__ inline int row_of(int i) { return (i * kThreads + threadIdx.x) / (kColumns / kChunk); }
__device__ inline int column_of() { return threadIdx.x % (kColumns / kChunk) * kChunk; }

struct Bytes {
  uint32_t values[kChunksPerThread];
};

/// The bytes of bits that belong to this thread's chunks of one step.
template <typename T>
__device__ Bytes read_bytes(const Job<T>& job, int64_t row, int64_t column) {
  Bytes bytes = {};
  const int64_t place = column + column_of(), row_bytes = ceil_div(job.x.columns, kChunk);
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int64_t r = row + row_of(i);
    if (r < job.x.rows && place < job.x.columns)
      bytes.values[i] = load(job.bits + r * row_bytes + place / kChunk);
  }
  return bytes;
}

/// acc += the tile of du, transposed, times the warp's 16 columns of the tile of x.
template <int kRank, typename T>
__device__ void multiply(const T* du, const T* x, Accumulator* acc) {
#pragma unroll
  for (int k = 0; k < kRows; k += kTile) {
    RightTile<T, RowMajor> right;
    nvcuda::wmma::load_matrix_sync(right, x + k * kPitch + threadIdx.x / kWarp * kTile, kPitch);
#pragma unroll
    for (int m = 0; m < kRank / kTile; ++m) {
      LeftTile<T, ColumnMajor> left;
      const int pitch = Layout<kRank>::kDuPitch;
      nvcuda::wmma::load_matrix_sync(left, du + k * pitch + m * kTile, pitch);
      nvcuda::wmma::mma_sync(acc[m], left, right, acc[m]);
    }
  }
}

/// Writes the block's part of dA: fp32 rows of 64 columns.
template <int kRank, typename T>
__device__ void write_sums(const Job<T>& job, int64_t column, const Accumulator* acc,
                           float* memory) {
  constexpr int kSumPitch = Layout<kRank>::kSumPitch;
#pragma unroll
  for (int m = 0; m < kRank / kTile; ++m) {
    float* to = memory + m * kTile * kSumPitch + threadIdx.x / kWarp * kTile;
    nvcuda::wmma::store_matrix_sync(to, acc[m], kSumPitch, nvcuda::wmma::mem_row_major);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRank * kColumns; i += kThreads) {
    const int r = i / kColumns, c = i % kColumns;
    if (r < job.partials.rows && column + c < job.partials.columns)
      store(job.partials.at(blockIdx.y, r) + column + c, memory[r * kSumPitch + c]);
  }
}

template <typename T, int kRank, bool kHasBits>
__global__ void __launch_bounds__(kThreads) project_grad_kernel(Job<T> job) {
  using L = Layout<kRank>;
  constexpr int kStages = L::kStages;
  RESLORA_SHARED(memory);
  T* x_tiles = reinterpret_cast<T*>(memory);
  T* du_tiles = x_tiles + kStages * L::kXTile;
  const int64_t column = int64_t{blockIdx.x} * kColumns;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int64_t steps = smaller(job.range, ceil_div(job.x.rows, kRows) - first);

  const auto fetch = [&](int64_t step) {
    const int slot = static_cast<int>(step % kStages);
    const int64_t row = (first + step) * kRows;
    fetch_tile<kRows, kColumns, kThreads>(x_tiles + slot * L::kXTile, job.x, row, column);
    fetch_tile<kRows, kRank, kThreads>(du_tiles + slot * L::kDuTile, job.du, row, 0);
  };
  Accumulator acc[kRank / kTile];
#pragma unroll
  for (int m = 0; m < kRank / kTile; ++m) nvcuda::wmma::fill_fragment(acc[m], 0.0f);
  Bytes bytes = {};
  if constexpr (kHasBits) bytes = read_bytes(job, first * kRows, column);

  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    __pipeline_wait_prior(kStages - 2);
    if constexpr (kHasBits) {  // a thread changes the chunks that it fetched itself
#pragma unroll
      for (int i = 0; i < kChunksPerThread; ++i)
        apply_bits(x + row_of(i) * kPitch + column_of(), bytes.values[i]);
    }
    __syncthreads();  // the tiles are whole, and the slot of the step before is free
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    __pipeline_commit();
    if constexpr (kHasBits) bytes = read_bytes(job, (first + step + 1) * kRows, column);
    multiply<kRank>(du_tiles + step % kStages * L::kDuTile, x, acc);
  }
  __syncthreads();  // the ring becomes room for the sums
  write_sums<kRank>(job, column, acc, reinterpret_cast<float*>(memory));
}

/// Column tiles times ranges of rows.
Cut cut_of(const ProjectGradArgs& args) {
  const int64_t tiles = ceil_div(args.x.columns, kColumns), steps = ceil_div(args.x.rows, kRows);
  return cut_into(tiles, steps, ranges_for(tiles, steps / 2, args.multiprocessors));
}

template <typename T, int kRank>
struct ProjectGradLauncher {
  static cudaError_t run(const ProjectGradArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    if (cut.tiles == 0) return cudaSuccess;
    const Partials partials = {static_cast<float*>(args.workspace), cut.ranges, args.dA.rows,
                               args.dA.columns};
    const Job<T> job = {view_of<T>(args.du), view_of<T>(args.x), args.bits, partials, cut.range};
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.ranges));
    auto kernel = args.bits ? project_grad_kernel<T, kRank, true>  //
                            : project_grad_kernel<T, kRank, false>;
    const cudaError_t error = start(kernel, grid, kThreads, Layout<kRank>::kBytes, stream, job);
    if (error != cudaSuccess) return error;
    return start_sum(partials, view_of<T>(args.dA), args.alpha, stream);
  }
};

}  // namespace

size_t workspace_bytes(const ProjectGradArgs& args) {
  return sizeof(float) * cut_of(args).ranges * args.dA.rows * args.dA.columns;
}

cudaError_t launch_project_grad(const ProjectGradArgs& args, cudaStream_t stream) {
  return dispatch<ProjectGradLauncher>(args.du.columns, args, stream);
}

}  // namespace reslora::cuda
