// u = alpha * kept x A^T in one read of x, with the dropout bits and the sum of x^2 on the way.
//
// A block owns 64 rows of x and walks along a range of columns, 64 at a time, through a ring of
// tiles in shared memory. Where few rows leave the device idle the columns are cut into ranges
// whose partial sums are added in order by a second kernel.
#include "device.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;   // of x, per block
constexpr int kDepth = 64;  // columns of x per step
constexpr int kPitch = kDepth + kPad;
constexpr int kChunksPerThread = kRows * kDepth / kChunk / kThreads;
constexpr int kSquaresThreads = 256;

/// Shared memory: kStages pairs of tiles; afterwards the block's part of u, in fp32.
template <int kRank>
struct Layout {
  static constexpr int kStages = kRank > 64 ? 3 : 4;
  static constexpr int kXTile = kRows * kPitch;
  static constexpr int kATile = kRank * kPitch;
  static constexpr int kUPitch = kRank + 4;
  static constexpr size_t kRingBytes = size_t{2} * kStages * (kXTile + kATile);
  static constexpr size_t kUBytes = size_t{4} * kRows * kUPitch;
  static constexpr size_t kBytes = kRingBytes > kUBytes ? kRingBytes : kUBytes;
};

template <typename T>
struct Job {
  View<const T> x;
  View<const T> A;
  View<T> u;
  float alpha;
  Mask mask;
  float* squares;     // a partial sum for each block, or null
  Partials partials;  // data null: u is written here
  int64_t range;      // steps of one block
};

/// The bytes of bits that belong to this thread's chunks of one step.
struct Bytes {
  uint32_t values[kChunksPerThread];
};

/// Where chunk i of this thread lies in a tile.
__device__ inline int row_of(int i) { return (i * kThreads + threadIdx.x) / (kDepth / kChunk); }
__device__ inline int column_of() { return threadIdx.x % (kDepth / kChunk) * kChunk; }

template <typename T>
__device__ Bytes read_bytes(const Job<T>& job, int64_t row, int64_t column) {
  Bytes bytes = {};
  const int64_t place = column + column_of(), row_bytes = ceil_div(job.x.columns, kChunk);
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int64_t r = row + row_of(i);
    if (r < job.x.rows && place < job.x.columns)
      bytes.values[i] = load(job.mask.bits + r * row_bytes + place / kChunk);
  }
  return bytes;
}

template <typename T>
__device__ Bytes draw_bytes(const Job<T>& job, PhiloxStart start, int64_t row, int64_t column) {
  Bytes bytes = {};
  const int64_t place = column + column_of(), row_bytes = ceil_div(job.x.columns, kChunk);
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int64_t r = row + row_of(i);
    if (r >= job.x.rows || place >= job.x.columns) continue;
    const int64_t index = r * row_bytes + place / kChunk;
    bytes.values[i] = draw_byte(start, static_cast<uint64_t>(index), job.mask.level);
    store(job.mask.bits + index, static_cast<uint8_t>(bytes.values[i]));
  }
  return bytes;
}

/// The sum of squares of this thread's chunks of a tile.
template <typename T>
__device__ float squares_of(const T* tile) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunksPerThread; ++i) {
    const auto chunk = *reinterpret_cast<const Chunk<T>*>(tile + row_of(i) * kPitch + column_of());
    for (int j = 0; j < kChunk; ++j) {
      const float value = to_float(chunk.values[j]);
      sum += value * value;
    }
  }
  return sum;
}

/// Adds the block's sum of squares up and writes it. `memory` holds a float for each warp.
__device__ inline void write_squares(float* to, float own, float* memory) {
  const float sum = warp_sum(own);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += memory[warp];
    store(to + int64_t{blockIdx.y} * gridDim.x + blockIdx.x, total);
  }
  __syncthreads();  // `memory` is used again
}

/// acc += the warp's 16 rows of the tile of x times the tile of A, transposed.
template <int kRank, typename T>
__device__ void multiply(const T* x, const T* A, Accumulator* acc) {
#pragma unroll
  for (int k = 0; k < kDepth; k += kTile) {
    LeftTile<T, RowMajor> left;
    nvcuda::wmma::load_matrix_sync(left, x + threadIdx.x / kWarp * kTile * kPitch + k, kPitch);
#pragma unroll
    for (int n = 0; n < kRank / kTile; ++n) {
      RightTile<T, ColumnMajor> right;
      nvcuda::wmma::load_matrix_sync(right, A + n * kTile * kPitch + k, kPitch);
      nvcuda::wmma::mma_sync(acc[n], left, right, acc[n]);
    }
  }
}

/// Writes the warp's 16 rows of u, or of its partial sum.
template <int kRank, typename T>
__device__ void write_u(const Job<T>& job, int64_t first_row, const Accumulator* acc,
                        float* memory) {
  constexpr int kUPitch = Layout<kRank>::kUPitch;
  float* rows = memory + threadIdx.x / kWarp * kTile * kUPitch;
#pragma unroll
  for (int n = 0; n < kRank / kTile; ++n)
    nvcuda::wmma::store_matrix_sync(rows + n * kTile, acc[n], kUPitch, nvcuda::wmma::mem_row_major);
  __syncwarp();
  const int64_t rank = job.u.columns;
  for (int i = threadIdx.x % kWarp; i < kTile * kRank / kChunk; i += kWarp) {
    const int r = i / (kRank / kChunk), c = i % (kRank / kChunk) * kChunk;
    const int64_t row = first_row + threadIdx.x / kWarp * kTile + r;
    if (row >= job.u.rows || c >= rank) continue;
    float* values = rows + r * kUPitch + c;
    if (job.partials.data != nullptr) {
      for (int j = 0; j < kChunk && c + j < rank; ++j)
        store(job.partials.at(blockIdx.y, row) + c + j, values[j]);
      continue;
    }
    for (int j = 0; j < kChunk; ++j) values[j] *= job.alpha;
    store_chunk(job.u, row, c, values);
  }
}

template <typename T, int kRank, Dropout kDropout>
__global__ void __launch_bounds__(kThreads) project_kernel(Job<T> job) {
  using L = Layout<kRank>;
  constexpr int kStages = L::kStages;
  RESLORA_SHARED(memory);
  T* x_tiles = reinterpret_cast<T*>(memory);
  T* A_tiles = x_tiles + kStages * L::kXTile;
  const int64_t row = int64_t{blockIdx.x} * kRows;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int64_t steps = smaller(job.range, ceil_div(job.x.columns, kDepth) - first);

  const auto fetch = [&](int64_t step) {
    const int slot = static_cast<int>(step % kStages);
    const int64_t column = (first + step) * kDepth;
    fetch_tile<kRows, kDepth, kThreads>(x_tiles + slot * L::kXTile, job.x, row, column);
    fetch_tile<kRank, kDepth, kThreads>(A_tiles + slot * L::kATile, job.A, 0, column);
  };
  Accumulator acc[kRank / kTile];
#pragma unroll
  for (int n = 0; n < kRank / kTile; ++n) nvcuda::wmma::fill_fragment(acc[n], 0.0f);
  float squares = 0.0f;
  PhiloxStart start = {};
  Bytes bytes = {};
  if constexpr (kDropout == Dropout::kDrawn) start = start_of(job.mask.philox);
  if constexpr (kDropout == Dropout::kGiven) bytes = read_bytes(job, row, first * kDepth);

  for (int64_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int64_t step = 0; step < steps; ++step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    __pipeline_wait_prior(kStages - 2);
    // A thread changes the chunks that it fetched itself: no barrier before.
    if (job.squares != nullptr) squares += squares_of(x);
    if constexpr (kDropout == Dropout::kDrawn)
      bytes = draw_bytes(job, start, row, (first + step) * kDepth);
    if constexpr (kDropout != Dropout::kNone) {
#pragma unroll
      for (int i = 0; i < kChunksPerThread; ++i)
        apply_bits(x + row_of(i) * kPitch + column_of(), bytes.values[i]);
    }
    __syncthreads();  // the tiles are whole, and the slot of the step before is free
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    __pipeline_commit();
    if constexpr (kDropout == Dropout::kGiven)
      bytes = read_bytes(job, row, (first + step + 1) * kDepth);
    multiply<kRank>(x, A_tiles + step % kStages * L::kATile, acc);
  }
  __syncthreads();  // the ring becomes room for u
  float* room = reinterpret_cast<float*>(memory);
  if (job.squares != nullptr) write_squares(job.squares, squares, room);
  write_u<kRank>(job, row, acc, room);
}

/// *to = the sum of `count` values, in a fixed order.
__global__ void __launch_bounds__(kSquaresThreads)
    sum_squares_kernel(const float* from, int64_t count, float* to) {
  RESLORA_SHARED(memory);
  float* sums = reinterpret_cast<float*>(memory);
  float own = 0.0f;
  for (int64_t i = threadIdx.x; i < count; i += kSquaresThreads) own += load(from + i);
  const float sum = warp_sum(own);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int warp = 0; warp < kSquaresThreads / kWarp; ++warp) total += sums[warp];
  store(to, total);
}

/// Row tiles times ranges of columns.
Cut cut_of(const ProjectArgs& args) {
  const int64_t tiles = ceil_div(args.x.rows, kRows), steps = ceil_div(args.x.columns, kDepth);
  return cut_into(tiles, steps, ranges_for(tiles, steps / 8, args.multiprocessors));
}

size_t partial_bytes(const ProjectArgs& args, const Cut& cut) {
  return cut.ranges == 1 ? 0 : sizeof(float) * cut.ranges * args.u.rows * args.u.columns;
}

template <typename T, int kRank>
struct ProjectLauncher {
  static cudaError_t run(const ProjectArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    const size_t partial = partial_bytes(args, cut);
    auto* sums = static_cast<float*>(args.workspace);
    float* squares = args.squares ? sums + partial / sizeof(float) : nullptr;
    const Partials partials = {partial ? sums : nullptr, cut.ranges, args.u.rows, args.u.columns};
    const Job<T> job = {view_of<T>(args.x), view_of<T>(args.A), view_of<T>(args.u),
                        args.alpha,         args.mask,          squares,
                        partials,           cut.range};
    cudaError_t error = cudaSuccess;
    if (cut.tiles > 0) error = start_blocks(job, cut, args.mask.dropout, stream);
    if (error == cudaSuccess && partial) error = start_sum(partials, job.u, args.alpha, stream);
    if (error == cudaSuccess && squares) {
      error = start(sum_squares_kernel, dim3(1), kSquaresThreads, 128, stream,
                    static_cast<const float*>(squares), cut.tiles * cut.ranges, args.squares);
    }
    return error;
  }

  static cudaError_t start_blocks(const Job<T>& job, const Cut& cut, Dropout dropout,
                                  cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(cut.tiles), static_cast<unsigned>(cut.ranges));
    auto kernel = project_kernel<T, kRank, Dropout::kNone>;
    if (dropout == Dropout::kGiven) kernel = project_kernel<T, kRank, Dropout::kGiven>;
    if (dropout == Dropout::kDrawn) kernel = project_kernel<T, kRank, Dropout::kDrawn>;
    return start(kernel, grid, kThreads, Layout<kRank>::kBytes, stream, job);
  }
};

}  // namespace

size_t workspace_bytes(const ProjectArgs& args) {
  const Cut cut = cut_of(args);
  return partial_bytes(args, cut) + (args.squares ? sizeof(float) * cut.tiles * cut.ranges : 0);
}

cudaError_t launch_project(const ProjectArgs& args, cudaStream_t stream) {
  return dispatch<ProjectLauncher>(args.u.columns, args, stream);
}

}  // namespace reslora::cuda
