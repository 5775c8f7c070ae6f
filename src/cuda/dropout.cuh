// Dropout bits on the device: drawn, read, and turned into masks of chunks.
//
// A mask is computed from signs: the difference of a random number and the level is negative where
// the element is kept, and one byte permutation spreads two signs over the halves of a word.
#pragma once

#include "device.cuh"

namespace reslora::cuda {

/// A word of four bytes out of a (0 to 3) and b (4 to 7), the lowest first: each digit of kBytes
/// names one, and 8 more means its sign in all of its bits.
template <uint32_t kBytes>
__device__ uint32_t permuted(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t word;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "n"(kBytes));
  return word;
#else
  const uint64_t all = uint64_t{b} << 32 | a;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = kBytes >> 4 * i & 15u;
    const auto byte = static_cast<uint32_t>(all >> 8 * (digit & 7u)) & 0xffu;
    word |= (digit < 8 ? byte : byte >> 7 ? 0xffu : 0u) << 8 * i;
  }
  return word;
#endif
}

/// The mask of a byte of bits.
__device__ inline Chunk mask_of(uint32_t bits) {
  constexpr uint32_t kToSigns = 1u << 7 | 1u << 14 | 1u << 21 | 1u << 28;  // bit i to byte i
  const uint32_t low = (bits & 15u) * kToSigns, high = (bits >> 4) * kToSigns;
  return {{permuted<0x9988>(low, low), permuted<0xbbaa>(low, low), permuted<0x9988>(high, high),
           permuted<0xbbaa>(high, high)}};
}

/// The byte of bits of a mask, in the low eight of the result.
__device__ inline uint32_t bits_of(const Chunk& mask) {
  uint32_t bits = 0;
  for (int k = 0; k < kChunk / 2; ++k) bits |= mask.pairs[k] & 0x20001u << 2 * k;
  return bits | bits >> 16;
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

/// a * b in 64 bits. Said in so many words it is one instruction: nvcc else adds 0 to the upper
/// half.
__host__ __device__ inline uint64_t wide_product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

/// Philox4x32-10: 128 random bits of a counter and a key.
__host__ __device__ inline uint4 philox4x32(uint4 counter, uint2 key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = wide_product(0xD2511F53u, counter.x);
    const uint64_t b = wide_product(0xCD9E8D57u, counter.z);
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(a)};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

/// A drawn mask: 16 random bits for each of eight elements. `place` is the index of the chunk's
/// byte in all of the bits; offset and place stand in the counter as in torch's own kernels.
__device__ inline Chunk drawn_mask(PhiloxStart start, uint64_t place, uint32_t level) {
  const uint64_t step = start.offset / 4;
  const uint4 random =
      philox4x32({static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                  static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32)},
                 {static_cast<uint32_t>(start.seed), static_cast<uint32_t>(start.seed >> 32)});
  const auto pair = [level](uint32_t word) {
    return permuted<0xffbb>((word & 0xffffu) - level, (word >> 16) - level);
  };
  return {{pair(random.x), pair(random.y), pair(random.z), pair(random.w)}};
}

/// The bits of a matrix: a byte for each chunk, rows without gaps.
struct BitMatrix {
  uint8_t* data;
  int64_t rows;
  int64_t row_bytes;
};

/// Where a thread's chunks of a tile have their bytes of bits; moves from tile to tile.
template <typename Own>
struct OwnBytes {
  /// Of the tile at (row, column) of the matrix.
  __device__ OwnBytes(const BitMatrix& all, int64_t row, int64_t column)
      : place((row + Own::row(0)) * all.row_bytes + column / kChunk + Own::column() / kChunk),
        row_bytes(all.row_bytes),
        rows(static_cast<int>(smaller(all.rows - row, kFar))),
        bytes(static_cast<int>(
            smaller(all.row_bytes - column / kChunk - Own::column() / kChunk, kFar))) {}

  /// False where chunk i lies outside of the matrix.
  __device__ bool has(int i) const { return Own::row(i) < rows && bytes > 0; }
  __device__ int64_t at(int i) const { return place + i * Own::kRowStep * row_bytes; }
  __device__ void move_right() { place += Own::kPerRow, bytes -= Own::kPerRow; }
  __device__ void move_down() { place += Own::kRows * row_bytes, rows -= Own::kRows; }

  static constexpr int64_t kFar = 0x7fffffff;
  int64_t place;
  int64_t row_bytes;
  int rows;   // of the matrix from the tile on
  int bytes;  // of a row from this thread's on
};

/// The bytes of a thread's chunks; 0 outside of the matrix.
template <typename Own>
struct Bytes {
  uint32_t values[Own::kCount];
};

template <typename Own>
__device__ Bytes<Own> read_bytes(const uint8_t* bits, const OwnBytes<Own>& own) {
  Bytes<Own> bytes = {};
#pragma unroll
  for (int i = 0; i < Own::kCount; ++i)
    if (own.has(i)) bytes.values[i] = load(bits + own.at(i));
  return bytes;
}

}  // namespace reslora::cuda
