// What the kernels share on the device: 16-byte access with scalar tails, tensor-core tiles, sums
// in a fixed order.
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
#include <utility>

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

/// Eight elements, or the mask of eight: two to a word, the first in its low half.
struct alignas(16) Chunk {
  uint32_t pairs[kChunk / 2];
};

__device__ inline Chunk chunk_at(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ inline uint4 words_of(const Chunk& chunk) {
  return {chunk.pairs[0], chunk.pairs[1], chunk.pairs[2], chunk.pairs[3]};
}

__device__ inline void put_chunk(void* address, const Chunk& chunk) {
  *static_cast<uint4*>(address) = words_of(chunk);
}

/// One store of 16 bytes to global memory; an assignment may be taken apart.
__device__ inline void store_vector(void* address, const uint4& v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(address)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  *static_cast<uint4*>(address) = v;
#endif
}

__device__ inline Chunk masked(Chunk chunk, const Chunk& mask) {
  for (int k = 0; k < kChunk / 2; ++k) chunk.pairs[k] &= mask.pairs[k];
  return chunk;
}

template <typename T>
__device__ float2 unpacked(uint32_t pair);
template <>
__device__ inline float2 unpacked<bfloat16>(uint32_t pair) {  // the upper halves of two floats
  const uint32_t low = pair << 16, high = pair & 0xffff0000u;
  return {reinterpret_cast<const float&>(low), reinterpret_cast<const float&>(high)};
}
template <>
__device__ inline float2 unpacked<half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ uint32_t packed(float low, float high);
template <>
__device__ inline uint32_t packed<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t packed<half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

/// Eight values, rounded.
template <typename T>
__device__ Chunk packed(const float* values) {
  Chunk chunk;
  for (int k = 0; k < kChunk / 2; ++k) chunk.pairs[k] = packed<T>(values[2 * k], values[2 * k + 1]);
  return chunk;
}

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

/// Eight elements one by one, of a row inside of the matrix; what lies beside it is 0.
template <typename T>
__device__ Chunk load_tail(const View<const T>& from, int64_t row, int64_t column) {
  alignas(16) T values[kChunk];
  for (int j = 0; j < kChunk; ++j) {
    const bool is_inside = column + j < from.columns;
    values[j] = is_inside ? load(from.at(row, column + j)) : from_float<T>(0.0f);
  }
  return chunk_at(values);
}

/// Copies 16 bytes to shared memory; writes zeros there, and reads nothing, where `is_inside` is
/// false. Complete for this thread after __pipeline_wait_prior, for others after a barrier as well.
template <typename T>
__device__ void copy_chunk(T* to, const T* from, bool is_inside = true) {
  if (is_inside) RESLORA_READS(from, 16);
  __pipeline_memcpy_async(to, from, 16, is_inside ? 0 : 16);
}

/// The chunks of a kRows x kColumns tile that belong to a thread: it fetches them, and may change
/// them before a barrier shows them to others.
template <int kHeight, int kColumns, int kThreads>
struct OwnChunks {
  static constexpr int kRows = kHeight;
  static constexpr int kPerRow = kColumns / kChunk;
  static constexpr int kRowStep = kThreads / kPerRow;  // from one chunk to the next
  static constexpr int kAll = kRows * kPerRow;
  static constexpr int kCount = (kAll + kThreads - 1) / kThreads;
  static_assert(kThreads % kPerRow == 0, "a thread's chunks lie below one another");

  __device__ static int row(int i) { return i * kRowStep + threadIdx.x / kPerRow; }
  __device__ static int column() { return threadIdx.x % kPerRow * kChunk; }
  __device__ static bool has(int i) {
    return (i + 1) * kThreads <= kAll || i * kThreads + static_cast<int>(threadIdx.x) < kAll;
  }
  /// Where chunk i lies in a tile with rows of kColumns + kPad elements.
  __device__ static int place(int i) {
    constexpr int kPitch = kColumns + kPad;
    return row(0) * kPitch + column() + i * kRowStep * kPitch;
  }
};

/// Copies a kRows x kColumns window to shared memory with rows of kColumns + kPad elements; what
/// lies outside of the matrix becomes 0.
template <typename Own, typename T>
__device__ void fetch_tile(T* to, const View<const T>& from, int64_t row, int64_t column) {
#pragma unroll 1
  for (int i = 0; i < Own::kCount; ++i) {
    if (!Own::has(i)) return;
    const int64_t r = row + Own::row(i), c = column + Own::column();
    if (r >= from.rows || c >= from.columns)
      put_chunk(to + Own::place(i), {});
    else if (from.holds_chunk(c))
      copy_chunk(to + Own::place(i), from.at(r, c));
    else
      put_chunk(to + Own::place(i), load_tail(from, r, c));
  }
}

/// Fetches a thread's chunks of one tile after the other, where these lie inside of the matrix and
/// are aligned: without bounds. With kIsThin the tile has `rows` rows, and zeros below.
template <typename Own, bool kIsThin, typename T>
struct Reader {
  /// The first tile lies at (row, column); from there each is `tile_step` elements further on.
  __device__ Reader(const View<const T>& from, int64_t row, int64_t column, int64_t tile_step,
                    int64_t rows)
      : next(from.at(row + Own::row(0), column + Own::column())),
        row_step(Own::kRowStep * from.stride),
        tile_step(tile_step),
        rows(static_cast<int>(rows)) {}

  __device__ void fetch(T* to) {
#pragma unroll
    for (int i = 0; i < Own::kCount; ++i)
      if (Own::has(i))
        copy_chunk(to + Own::place(i), next + i * row_step, !kIsThin || Own::row(i) < rows);
    next += tile_step;
  }

  const T* next;  // the thread's first chunk of the next tile
  int64_t row_step;
  int64_t tile_step;
  int rows;
};

/// Writes eight elements, those inside of the matrix; `row` is inside.
template <typename T>
__device__ void store_chunk(const View<T>& to, int64_t row, int64_t column, const Chunk& chunk) {
  if (to.holds_chunk(column)) {
    RESLORA_WRITES(to.at(row, column), 16);
    store_vector(to.at(row, column), words_of(chunk));
    return;
  }
  const T* values = reinterpret_cast<const T*>(chunk.pairs);
  for (int j = 0; j < kChunk && column + j < to.columns; ++j)
    store(to.at(row, column + j), values[j]);
}

// ---- Tensor-core tiles: 16 x 16 x 16

using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float>;
template <typename T, typename Layout>
using LeftTile = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kTile, kTile, kTile, T, Layout>;
template <typename T, typename Layout>
using RightTile = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kTile, kTile, kTile, T, Layout>;
using RowMajor = nvcuda::wmma::row_major;
using ColumnMajor = nvcuda::wmma::col_major;

/// Loads the tile `kOffset` elements beyond an address of shared memory; rows lie `pitch` elements
/// apart.
template <int kOffset = 0, typename Tile, typename T>
__device__ void load_tile(Tile& to, const T* from, int pitch) {
  nvcuda::wmma::load_matrix_sync(to, from + kOffset, pitch);
}

#ifdef __CUDACC__
// In bf16 nvcc does not see that the address is one of shared memory, and emits four generic loads
// for what one ldmatrix does; the instruction itself says so, and takes the offset in.
#define RESLORA_LOAD_TILE(Tile, Layout, operand, layout)                                   \
  template <int kOffset = 0>                                                               \
  __device__ void load_tile(Tile<bfloat16, Layout>& to, const bfloat16* from, int pitch) { \
    static_assert(sizeof(to.x) == 16, "four registers");                                   \
    auto* words = reinterpret_cast<uint32_t*>(to.x);                                       \
    asm volatile("wmma.load." operand ".sync.aligned." layout                              \
                 ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4 + %6], %5;"                 \
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])          \
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))), "r"(pitch), \
                   "n"(kOffset * 2)                                                        \
                 : "memory");                                                              \
  }
RESLORA_LOAD_TILE(LeftTile, RowMajor, "a", "row")
RESLORA_LOAD_TILE(LeftTile, ColumnMajor, "a", "col")
RESLORA_LOAD_TILE(RightTile, RowMajor, "b", "row")
RESLORA_LOAD_TILE(RightTile, ColumnMajor, "b", "col")
#undef RESLORA_LOAD_TILE
#endif

/// A constant, for offsets that an instruction takes in.
template <int kValue>
struct Constant {
  __host__ __device__ constexpr operator int() const { return kValue; }
};

/// Calls f with the constants 0 to kCount - 1.
template <typename F, int... kIndices>
__device__ void each_of(std::integer_sequence<int, kIndices...>, F f) {
  (f(Constant<kIndices>{}), ...);
}
template <int kCount, typename F>
__device__ void each(F f) {
  each_of(std::make_integer_sequence<int, kCount>{}, f);
}

// ---- Sums over blocks

__device__ inline float* row_of(const Parts& parts, int64_t part, int64_t row) {
  return parts.data + part * parts.part_stride + row * parts.row_stride;
}

/// The sum over a warp, in lane 0; a fixed tree.
__device__ inline float warp_sum(float value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value += __shfl_down_sync(0xffffffffu, value, distance);
  return value;
}

/// The sum over a block of kThreads, in thread 0; a fixed order. `memory` holds a float for each
/// warp.
template <int kThreads>
__device__ float block_sum(float value, float* memory) {
  const float sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) memory[threadIdx.x / kWarp] = sum;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += memory[warp];
  __syncthreads();  // `memory` is used again
  return total;
}

}  // namespace reslora::cuda
