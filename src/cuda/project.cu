// u = alpha * kept x A^T in one read of x, with the dropout bits and the sum of x^2 on the way.
//
// A block owns 64 rows of x and walks along a range of columns, 64 at a time, through a ring of
// tiles in shared memory. Where few rows leave the device idle the columns are cut into ranges,
// and each range leaves its part of the sum.
#include "dropout.cuh"
#include "start.cuh"

namespace reslora::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;   // of x, per block
constexpr int kDepth = 64;  // columns of x per step
constexpr int kPitch = kDepth + kPad;
using Own = OwnChunks<kRows, kDepth, kThreads>;  // of x

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
  static_assert(kBytes <= kLeastBytes, "every device can start it");
  static constexpr int kBlocks = blocks_beside(kBytes);
};

template <typename T>
struct Job {
  View<const T> x;
  View<const T> A;
  View<T> u;
  float alpha;
  Mask mask;
  float* squares;  // a sum for each block, or null
  Parts parts;     // data null: u is written here
  int64_t range;   // steps of one block

  __device__ BitMatrix bits() const { return {mask.bits, x.rows, ceil_div(x.columns, kChunk)}; }
};

template <typename T>
__device__ void add_squares(const Chunk& chunk, float* sum) {
#pragma unroll
  for (int k = 0; k < kChunk / 2; ++k) {
    const float2 pair = unpacked<T>(chunk.pairs[k]);
    *sum += pair.x * pair.x;
    *sum += pair.y * pair.y;
  }
}

/// Drops elements of this thread's chunks of a tile of x, by bits that are given or drawn and
/// written. Adds their squares before that to `squares`, a sum for each, where these are asked for.
template <Dropout kDropout, typename T>
__device__ void prepare(const Job<T>& job, T* x, const OwnBytes<Own>& own, const Bytes<Own>& given,
                        PhiloxStart start, float* squares) {
#pragma unroll
  for (int i = 0; i < Own::kCount; ++i) {
    T* place = x + Own::place(i);
    const Chunk chunk = chunk_at(place);
    if (job.squares != nullptr) add_squares<T>(chunk, squares + i);
    if constexpr (kDropout == Dropout::kGiven)
      put_chunk(place, masked(chunk, mask_of(given.values[i])));
    if constexpr (kDropout == Dropout::kDrawn) {
      const Chunk mask = drawn_mask(start, static_cast<uint64_t>(own.at(i)), job.mask.level);
      put_chunk(place, masked(chunk, mask));
      if (own.has(i)) store(job.mask.bits + own.at(i), static_cast<uint8_t>(bits_of(mask)));
    }
  }
}

/// Adds the block's sums of squares up and writes the total. `memory` holds a float for each warp.
__device__ inline void write_squares(float* to, const float* own, float* memory) {
  float all = 0.0f;
  for (int i = 0; i < Own::kCount; ++i) all += own[i];
  const float total = block_sum<kThreads>(all, memory);
  if (threadIdx.x == 0) store(to + int64_t{blockIdx.y} * gridDim.x + blockIdx.x, total);
}

/// acc += the warp's 16 rows of the tile of x times the tile of A, transposed.
template <int kRank, typename T>
__device__ void multiply(const T* x, const T* A, Accumulator* acc) {
  x += threadIdx.x / kWarp * kTile * kPitch;
  each<kDepth / kTile>([&](auto k) {
    LeftTile<T, RowMajor> left;
    load_tile<k * kTile>(left, x, kPitch);
    each<kRank / kTile>([&](auto n) {
      RightTile<T, ColumnMajor> right;
      load_tile<n * kTile * kPitch + k * kTile>(right, A, kPitch);
      nvcuda::wmma::mma_sync(acc[n], left, right, acc[n]);
    });
  });
}

/// Writes the warp's 16 rows of u, or of its part of the sum.
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
    if (job.parts.data != nullptr) {
      for (int j = 0; j < kChunk && c + j < rank; ++j)
        store(row_of(job.parts, blockIdx.y, row) + c + j, values[j]);
      continue;
    }
    for (int j = 0; j < kChunk; ++j) values[j] *= job.alpha;
    store_chunk(job.u, row, c, packed<T>(values));
  }
}

template <typename T, int kRank, Dropout kDropout>
__global__ void __launch_bounds__(kThreads, Layout<kRank>::kBlocks) project_kernel(Job<T> job) {
  using L = Layout<kRank>;
  constexpr int kStages = L::kStages;
  RESLORA_SHARED(memory);
  using OwnA = OwnChunks<kRank, kDepth, kThreads>;
  T* x_tiles = reinterpret_cast<T*>(memory);
  T* A_tiles = x_tiles + kStages * L::kXTile;
  const int64_t row = int64_t{blockIdx.x} * kRows;
  const int64_t first = int64_t{blockIdx.y} * job.range;
  const int steps = static_cast<int>(smaller(job.range, ceil_div(job.x.columns, kDepth) - first));

  const bool is_whole = row + kRows <= job.x.rows && job.x.is_aligned && job.A.is_aligned;
  const int whole = is_whole ? static_cast<int>(smaller(job.x.columns / kDepth - first, steps)) : 0;
  Reader<Own, false, T> x_reader(job.x, row, first * kDepth, kDepth, kRows);
  Reader<OwnA, true, T> A_reader(job.A, 0, first * kDepth, kDepth, job.A.rows);

  const auto fetch = [&](int step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    T* A = A_tiles + step % kStages * L::kATile;
    if (step < whole) {
      x_reader.fetch(x);
      A_reader.fetch(A);
    } else {
      fetch_tile<Own>(x, job.x, row, (first + step) * kDepth);
      fetch_tile<OwnA>(A, job.A, 0, (first + step) * kDepth);
    }
  };
  Accumulator acc[kRank / kTile];
#pragma unroll
  for (int n = 0; n < kRank / kTile; ++n) nvcuda::wmma::fill_fragment(acc[n], 0.0f);
  float squares[Own::kCount] = {};
  PhiloxStart start = {};
  OwnBytes<Own> own(job.bits(), row, first * kDepth);
  Bytes<Own> bytes = {};
  if constexpr (kDropout == Dropout::kDrawn) start = start_of(job.mask.philox);
  if constexpr (kDropout == Dropout::kGiven) bytes = read_bytes(job.mask.bits, own);

  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) fetch(step);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; ++step) {
    T* x = x_tiles + step % kStages * L::kXTile;
    __pipeline_wait_prior(kStages - 2);
    // A thread changes the chunks that it fetched itself: no barrier before.
    if (kDropout != Dropout::kNone || job.squares != nullptr)
      prepare<kDropout>(job, x, own, bytes, start, squares);
    own.move_right();
    __syncthreads();  // the tiles are whole, and the slot of the step before is free
    if (step + kStages - 1 < steps) fetch(step + kStages - 1);
    __pipeline_commit();
    if constexpr (kDropout == Dropout::kGiven) bytes = read_bytes(job.mask.bits, own);
    multiply<kRank>(x, A_tiles + step % kStages * L::kATile, acc);
  }
  __syncthreads();  // the ring becomes room for u
  float* room = reinterpret_cast<float*>(memory);
  if (job.squares != nullptr) write_squares(job.squares, squares, room);
  write_u<kRank>(job, row, acc, room);
}

template <typename T, int kRank>
struct ProjectLauncher {
  static cudaError_t run(const ProjectArgs& args, cudaStream_t stream) {
    const Cut cut = cut_of(args);
    if (cut.tiles == 0) return cudaSuccess;
    if (cut.ranges > 1 && args.parts.data == nullptr) return cudaErrorInvalidValue;
    const Job<T> job = {view_of<T>(args.x), view_of<T>(args.A), view_of<T>(args.u), args.alpha,
                        args.mask,          args.squares,       args.parts,         cut.range};
    return start_blocks(job, cut, args.mask.dropout, stream);
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

/// Row tiles times ranges of columns.
Cut cut_of(const ProjectArgs& args) {
  return cut_into(ceil_div(args.x.rows, kRows), ceil_div(args.x.columns, kDepth),
                  args.multiprocessors);
}

cudaError_t launch_project(const ProjectArgs& args, cudaStream_t stream) {
  return dispatch<ProjectLauncher>(args.u.columns, args, stream);
}

}  // namespace reslora::cuda
