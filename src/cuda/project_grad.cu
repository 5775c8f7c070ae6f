// dA = alpha * du^T kept x in one read of x.
//
// A block owns 64 columns of dA, which it keeps in registers, and a range of rows of x and du,
// through which it walks 64 at a time. Each range leaves its part of the sum.
#include "dropout.cuh"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of dA, per block
constexpr int kRows = 64;     // of x and du per step
constexpr int kPitch = kColumns + kPad;
using Own = OwnChunks<kRows, kColumns, kThreads>;  // of x

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
  static_assert(kBytes <= kLeastBytes, "every device can start it");
  static constexpr int kBlocks = blocks_beside(kBytes);
};

template <typename T>
struct Job {
  View<const T> du;
  View<const T> x;
  BitMatrix bits;
  Parts dA;
  int64_t range;  // steps of one block
};

/// acc += the tile of du, transposed, times the warp's 16 columns of the tile of x.
template <int kRank, typename T>
__device__ void multiply(const T* du, const T* x, Accumulator* acc) {
  constexpr int kDuPitch = Layout<kRank>::kDuPitch;
  x += threadIdx.x / kWarp * kTile;
  each<kRows / kTile>([&](auto k) {
    RightTile<T, RowMajor> right;
    load_tile<k * kTile * kPitch>(right, x, kPitch);
    each<kRank / kTile>([&](auto m) {
      LeftTile<T, ColumnMajor> left;
      load_tile<k * kTile * kDuPitch + m * kTile>(left, du, kDuPitch);
      nvcuda::wmma::mma_sync(acc[m], left, right, acc[m]);
    });
  });
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
    if (r < job.du.columns && column + c < job.x.columns)
      store(row_of(job.dA, blockIdx.y, r) + column + c, memory[r * kSumPitch + c]);
  }
}

template <typename T, int kRank, bool kHasBits>
__global__ void __launch_bounds__(kThreads, Layout<kRank>::kBlocks)
    project_grad_kernel(Job<T> job) {
  using L = Layout<kRank>;
  constexpr int kStages = L::kStages;
  RESLORA_SHARED(memory);
  using OwnDu = OwnChunks<kRows, kRank, kThreads>;
  T* x_tiles = reinterpret_cast<T*>(memory);
  T* du_tiles = x_tiles + kStages * L::kXTile;
  const int64_t column = int64_t{blockIdx.x} * kColumns;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int steps = static_cast<int>(smaller(job.range, ceil_div(job.x.rows, kRows) - first));

  const bool is_whole = column + kColumns <= job.x.columns && job.x.is_aligned &&
                        job.du.is_aligned && job.du.columns % kChunk == 0;
  const int whole = is_whole ? static_cast<int>(smaller(job.x.rows / kRows - first, steps)) : 0;
  const bool has_du = OwnDu::column() < job.du.columns;
  Reader<Own, false, T> x_reader(job.x, first * kRows, column, kRows * job.x.stride, kRows);
  Reader<OwnDu, true, T> du_reader(job.du, first * kRows, 0, kRows * job.du.stride,
                                   has_du ? kRows : 0);

  const auto fetch = [&](int step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    T* du = du_tiles + step % kStages * L::kDuTile;
    if (step < whole) {
      x_reader.fetch(x);
      du_reader.fetch(du);
    } else {
      fetch_tile<Own>(x, job.x, (first + step) * kRows, column);
      fetch_tile<OwnDu>(du, job.du, (first + step) * kRows, 0);
    }
  };
  Accumulator acc[kRank / kTile];
#pragma unroll
  for (int m = 0; m < kRank / kTile; ++m) nvcuda::wmma::fill_fragment(acc[m], 0.0f);
  OwnBytes<Own> own(job.bits, first * kRows, column);
  Bytes<Own> bytes = {};
  if constexpr (kHasBits) bytes = read_bytes(job.bits.data, own);

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    __pipeline_wait_prior(kStages - 2);
    if constexpr (kHasBits) {  // a thread changes the chunks that it fetched itself
#pragma unroll
      for (int i = 0; i < Own::kCount; ++i)
        put_chunk(x + Own::place(i), masked(chunk_at(x + Own::place(i)), mask_of(bytes.values[i])));
    }
    own.move_down();
    __syncthreads();  // the tiles are whole, and the slot of the step before is free
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    __pipeline_commit();
    if constexpr (kHasBits) bytes = read_bytes(job.bits.data, own);
    multiply<kRank>(du_tiles + step % kStages * L::kDuTile, x, acc);
  }
  __syncthreads();  // the ring becomes room for the sums
  write_sums<kRank>(job, column, acc, reinterpret_cast<float*>(memory));
}

template <typename T, int kRank>
struct ProjectGradLauncher {
  static cudaError_t run(const ProjectGradArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    if (cut.tiles == 0) return cudaSuccess;
    auto* bits = const_cast<uint8_t*>(args.bits);  // only read
    const Job<T> job = {view_of<T>(args.du),
                        view_of<T>(args.x),
                        {bits, args.x.rows, ceil_div(args.x.columns, kChunk)},
                        args.dA,
                        cut.range};
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.ranges));
    auto kernel = args.bits ? project_grad_kernel<T, kRank, true>  //
                            : project_grad_kernel<T, kRank, false>;
    return start(kernel, grid, kThreads, Layout<kRank>::kBytes, stream, job);
  }
};

}  // namespace

/// Column tiles times ranges of rows.
Cut cut_of(const ProjectGradArgs& args) {
  return cut_into(ceil_div(args.x.columns, kColumns), ceil_div(args.x.rows, kRows),
                  args.multiprocessors);
}

cudaError_t launch_project_grad(const ProjectGradArgs& args, cudaStream_t stream) {
  return dispatch<ProjectGradLauncher>(args.du.columns, args, stream);
}

}  // namespace reslora::cuda
