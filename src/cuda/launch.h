// The CUDA kernels beside the big GEMMs: what each computes, on raw pointers, without torch.
//
// Contract: matrices are bf16 or fp16 and lie on the current device; products accumulate in fp32.
// Where several blocks have a share in a result, each leaves a part of the sum, and `pieces`
// (elementwise.h) adds the parts up in their order, so equal inputs give equal bits on one device.
// The caller owns all memory. A launch enqueues on `stream`, waits for nothing and returns the
// first error. "Kept x" is x with dropped elements 0. Rank: u, s, ds have R <= kMaxRank columns.
#pragma once

#include <driver_types.h>

#include <cstddef>
#include <cstdint>

namespace reslora::cuda {

constexpr int64_t kMaxRank = 128;
/// That of launch_expand_grad: beyond it partial sums of ds cost what one read of gy saves.
constexpr int64_t kMaxExpandGradRank = 32;

enum class Type { kBFloat16, kHalf };

/// Element (i, j) lies at data[i * stride + j]; stride counts elements. Rows that start on 16-byte
/// boundaries are read and written in vectors, others element by element.
struct ConstMatrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

struct Matrix {
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
};

/// Parts of a sum: element (i, j) of part p lies at data[p * part_stride + i * row_stride + j].
/// How many parts there are is a matter of `cut_of`.
struct Parts {
  float* data = nullptr;
  int64_t part_stride = 0;
  int64_t row_stride = 0;
};

/// Where the random numbers start. While a CUDA graph is captured the seed and the offset lie in
/// device memory, so that each replay draws anew: then the pointers are set, and `offset` is added
/// to *offset_at.
struct Philox {
  uint64_t seed = 0;
  uint64_t offset = 0;
  const int64_t* seed_at = nullptr;
  const int64_t* offset_at = nullptr;
};

/// By how much one draw of bits advances a Philox offset.
constexpr uint64_t kPhiloxIncrement = 4;

enum class Dropout {
  kNone,
  kGiven,  // bits are read
  kDrawn,  // bits are drawn and written
};

/// Bits: uint8 [T, ceil(n/8)], dense; bit j%8 of byte j/8 belongs to element j, 1 = kept. A drawn
/// element is kept with probability level / 65536; the draw depends on seed, offset and the
/// element's place alone.
struct Mask {
  Dropout dropout = Dropout::kNone;
  uint8_t* bits = nullptr;
  uint32_t level = 65536;
  Philox philox;
};

/// u = alpha * kept x A^T, and the squares of x before dropout, summed up by each block. Reads x
/// once, writes T x R and the drawn bits. A cut into several ranges needs `parts`: then these hold
/// what u is alpha times the sum of, and u is not written.
struct ProjectArgs {
  Type type;
  ConstMatrix x;  // [T, in]
  ConstMatrix A;  // [R, in]
  Matrix u;       // [T, R]
  float alpha;
  Mask mask;
  float* squares;       // [tiles * ranges], or null
  Parts parts;          // [ranges] of [T, R]; data null: none
  int multiprocessors;  // of the device
};

/// ds = gy B and dB = gy^T s, in parts. Reads gy once. R <= kMaxExpandGradRank.
struct ExpandGradArgs {
  Type type;
  ConstMatrix gy;  // [T, out]
  ConstMatrix B;   // [out, R]
  ConstMatrix s;   // [T, R]
  Parts ds;        // [tiles] of [T, R]
  Parts dB;        // [ranges] of [out, R]
  int multiprocessors;
};

/// dA = du^T kept x, in parts. Reads x once, and given bits.
struct ProjectGradArgs {
  Type type;
  ConstMatrix du;       // [T, R]
  ConstMatrix x;        // [T, in]
  Parts dA;             // [ranges] of [R, in]
  const uint8_t* bits;  // null keeps all
  int multiprocessors;
};

/// out = kept (alpha * u P + base). Writes out once.
struct ExpandArgs {
  Type type;
  ConstMatrix u;     // [T, R]
  ConstMatrix P;     // [R, n]
  Matrix out;        // [T, n]
  ConstMatrix base;  // [T, n]; a stride of 0 repeats one row; data null: no base
  float alpha;
  const uint8_t* bits;  // null keeps all
};

/// How a launch is divided: into `ranges` blocks for each tile of the dimension that blocks own.
/// The sizes of the wide matrix and the device decide, not the rank.
struct Cut {
  int64_t tiles;
  int64_t range;  // steps along the other dimension that a block takes
  int64_t ranges;
};

Cut cut_of(const ProjectArgs& args);
Cut cut_of(const ExpandGradArgs& args);
Cut cut_of(const ProjectGradArgs& args);

cudaError_t launch_project(const ProjectArgs& args, cudaStream_t stream);
cudaError_t launch_expand_grad(const ExpandGradArgs& args, cudaStream_t stream);
cudaError_t launch_project_grad(const ProjectGradArgs& args, cudaStream_t stream);
cudaError_t launch_expand(const ExpandArgs& args, cudaStream_t stream);

}  // namespace reslora::cuda
