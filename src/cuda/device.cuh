// What the kernels share: 16-byte access with scalar tails, dropout bits, fixed-order sums,
// launches.
//
// All global memory is read and written through the functions here, which a test build counts
// (RESLORA_READS, RESLORA_WRITES); shared memory comes from RESLORA_SHARED alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <mma.h>

#include <cstdint>

#include "launch.h"

#ifndef RESLORA_SHARED
#define RESLORA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define RESLORA_READS(address, bytes) ((void)0)
#define RESLORA_WRITES(address, bytes) ((void)0)
#endif

namespace reslora::cuda {

using bfloat16 = __nv_bfloat16;
using half = __half;

constexpr int kChunk = 8;  // elements of one 16-byte access, and of one byte of bits
constexpr int kTile = 16;  // edge of a tensor-core tile
constexpr int kWarp = 32;
// Rows in shared memory end with this many unused elements: rows start in different banks, and at
// multiples of the 16 bytes that wmma asks for.
constexpr int kPad = 8;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Elements

__device__ inline float to_float(bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(half v) { return __half2float(v); }

template <typename T>
__device__ T from_float(float v);
template <>
__device__ inline bfloat16 from_float<bfloat16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ inline half from_float<half>(float v) {
  return __float2half(v);
}

template <typename T>
__device__ T load(const T* address) {
  RESLORA_READS(address, sizeof(T));
  return *address;
}

template <typename T>
__device__ void store(T* address, T value) {
  RESLORA_WRITES(address, sizeof(T));
  *address = value;
}

/// Eight elements at a 16-byte boundary.
template <typename T>
struct alignas(16) Chunk {
  T values[kChunk];
};

// ---- Matrices

/// A matrix of the launch interface with its type; vectors are used where every row is aligned.
template <typename T>
struct View {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  bool is_aligned;

  __device__ T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  __device__ bool holds_chunk(int64_t column) const {
    return is_aligned && column + kChunk <= columns;
  }
};

inline bool is_aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk == 0;
}

template <typename T>
View<const T> view_of(const ConstMatrix& m) {
  return {static_cast<const T*>(m.data), m.rows, m.columns, m.stride, is_aligned(m.data, m.stride)};
}

template <typename T>
View<T> view_of(const Matrix& m) {
  return {static_cast<T*>(m.data), m.rows, m.columns, m.stride, is_aligned(m.data, m.stride)};
}

/// Copies eight elements to shared memory; what lies outside of the matrix becomes 0. The copy is
/// complete for this thread after __pipeline_wait_prior, for others after a barrier as well.
template <typename T>
__device__ void fetch_chunk(T* to, const View<const T>& from, int64_t row, int64_t column) {
  if (row < from.rows && from.holds_chunk(column)) {
    RESLORA_READS(from.at(row, column), 16);
    __pipeline_memcpy_async(to, from.at(row, column), 16);
    return;
  }
  Chunk<T> chunk;
  for (int j = 0; j < kChunk; ++j) {
    const bool is_inside = row < from.rows && column + j < from.columns;
    chunk.values[j] = is_inside ? load(from.at(row, column + j)) : from_float<T>(0.0f);
  }
  *reinterpret_cast<Chunk<T>*>(to) = chunk;
}

/// Copies a kRows x kColumns window to shared memory with rows of kColumns + kPad elements.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ void fetch_tile(T* to, const View<const T>& from, int64_t row, int64_t column) {
  constexpr int kPerRow = kColumns / kChunk;
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    const int r = i / kPerRow, c = i % kPerRow * kChunk;
    fetch_chunk(to + r * (kColumns + kPad) + c, from, row + r, column + c);
  }
}

/// Writes eight values, those inside of the matrix; `row` is inside.
template <typename T>
__device__ void store_chunk(const View<T>& to, int64_t row, int64_t column, const float* values) {
  Chunk<T> chunk;
  for (int j = 0; j < kChunk; ++j) chunk.values[j] = from_float<T>(values[j]);
  if (to.holds_chunk(column)) {
    RESLORA_WRITES(to.at(row, column), 16);
    *reinterpret_cast<Chunk<T>*>(to.at(row, column)) = chunk;
    return;
  }
  for (int j = 0; j < kChunk && column + j < to.columns; ++j)
    store(to.at(row, column + j), chunk.values[j]);
}

// ---- Dropout

/// Sets to 0 what `kept`, a byte of bits, does not keep. `chunk` lies at a 16-byte boundary.
template <typename T>
__device__ void apply_bits(T* chunk, uint32_t kept) {
  auto* pairs = reinterpret_cast<uint4*>(chunk);
  const auto pair = [kept](int first) {
    return (kept >> first & 1u ? 0x0000ffffu : 0u) | (kept >> first & 2u ? 0xffff0000u : 0u);
  };
  uint4 v = *pairs;
  v.x &= pair(0);
  v.y &= pair(2);
  v.z &= pair(4);
  v.w &= pair(6);
  *pairs = v;
}

struct PhiloxStart {
  uint64_t seed;
  uint64_t offset;
};

__device__ inline PhiloxStart start_of(const Philox& philox) {
  if (philox.seed_at == nullptr) return {philox.seed, philox.offset};
  return {static_cast<uint64_t>(load(philox.seed_at)),
          static_cast<uint64_t>(load(philox.offset_at)) + philox.offset};
}

/// Philox4x32-10: 128 random bits of a counter and a key.
__host__ __device__ inline uint4 philox4x32(uint4 counter, uint2 key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(a)};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

/// A byte of bits: 16 random bits for each of eight elements. `place` is the byte's index in the
/// whole mask; offset and place stand in the counter as in torch's own kernels.
__host__ __device__ inline uint32_t draw_byte(PhiloxStart start, uint64_t place, uint32_t level) {
  const uint64_t step = start.offset / 4;
  const uint4 random =
      philox4x32({static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                  static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32)},
                 {static_cast<uint32_t>(start.seed), static_cast<uint32_t>(start.seed >> 32)});
  const auto pair = [level](uint32_t word) {
    return ((word & 0xffffu) < level ? 1u : 0u) | ((word >> 16) < level ? 2u : 0u);
  };
  return pair(random.x) | pair(random.y) << 2 | pair(random.z) << 4 | pair(random.w) << 6;
}

// ---- Tensor-core tiles: 16 x 16 x 16

using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float>;
template <typename T, typename Layout>
using LeftTile = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kTile, kTile, kTile, T, Layout>;
template <typename T, typename Layout>
using RightTile = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kTile, kTile, kTile, T, Layout>;
using RowMajor = nvcuda::wmma::row_major;
using ColumnMajor = nvcuda::wmma::col_major;

// ---- Sums over blocks

/// fp32 [parts, rows, columns]: what each block has summed.
struct Partials {
  float* data;
  int64_t parts;
  int64_t rows;
  int64_t columns;

  __host__ __device__ float* at(int64_t part, int64_t row) const {
    return data + (part * rows + row) * columns;
  }
};

constexpr int kSumThreads = 128;

/// out = alpha * sum of the parts, in the order of the parts.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_kernel(Partials from, View<T> out, float alpha) {
  const int64_t size = from.rows * from.columns;
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < from.parts; ++part) sum += load(from.data + part * size + i);
  store(out.at(i / from.columns, i % from.columns), from_float<T>(alpha * sum));
}

/// The sum over a warp, in lane 0; a fixed tree.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

// ---- Launches

/// Starts a kernel with `shared_bytes` of dynamic shared memory.
template <typename Kernel, typename... Args>
cudaError_t start(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                  const Args&... args) {
  if (shared_bytes > 48 * 1024) {  // beyond what a kernel may have unasked
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T>
cudaError_t start_sum(const Partials& from, const View<T>& out, float alpha, cudaStream_t stream) {
  const int64_t blocks = ceil_div(from.rows * from.columns, kSumThreads);
  if (blocks == 0) return cudaSuccess;
  return start(sum_kernel<T>, dim3(static_cast<unsigned>(blocks)), kSumThreads, 0, stream, from,
               out, alpha);
}

/// Calls f with a value of the element type and the rank padded to 16, 32, 64 or 128.
template <typename T, template <typename, int> class Launcher, typename Args>
cudaError_t for_rank(int64_t rank, const Args& args, cudaStream_t stream) {
  if (rank <= 16) return Launcher<T, 16>::run(args, stream);
  if (rank <= 32) return Launcher<T, 32>::run(args, stream);
  if (rank <= 64) return Launcher<T, 64>::run(args, stream);
  if (rank <= kMaxRank) return Launcher<T, 128>::run(args, stream);
  return cudaErrorInvalidValue;
}

/// Runs the launcher for the type and rank.
template <template <typename, int> class Launcher, typename Args>
cudaError_t dispatch(int64_t rank, const Args& args, cudaStream_t stream) {
  if (args.type == Type::kBFloat16) return for_rank<bfloat16, Launcher>(rank, args, stream);
  return for_rank<half, Launcher>(rank, args, stream);
}

/// How the work is cut: tiles of one dimension times ranges of the other.
struct Cut {
  int64_t tiles;
  int64_t range;  // steps of one block
  int64_t ranges;
};

inline Cut cut_into(int64_t tiles, int64_t steps, int64_t ranges) {
  const int64_t least = steps < 1 ? 1 : steps;
  const int64_t range = ceil_div(least, ranges);
  return {tiles, range, ceil_div(least, range)};
}

/// Into how many ranges to cut `steps` so that `tiles` times that many blocks fill the device
/// twice.
inline int64_t ranges_for(int64_t tiles, int64_t steps, int multiprocessors) {
  const int64_t wanted = ceil_div(int64_t{2} * multiprocessors, tiles < 1 ? 1 : tiles);
  return smaller(wanted < 1 ? 1 : wanted, steps < 1 ? 1 : steps);
}

}  // namespace reslora::cuda
