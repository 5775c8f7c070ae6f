// Stands in for the toolkit's mma.h: nvcuda::wmma on 16 x 16 x 16 tiles of plain floats.
//
// Lane l owns row 15 - l / 2 and eight columns of the accumulator (a kernel may not know which),
// and loads the row of the left and the columns of the right matrix that it needs: together the
// lanes read each tile once at least, and sanitizers see every element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

#include "../emulator.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

namespace emulated {

inline int row() { return 15 - cuda_on_cpu::lane() / 2; }
inline int column() { return cuda_on_cpu::lane() % 2 * 8; }

inline float decode(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float decode(__half v) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (unsigned i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      values[i] = __half2float(__half(raw));
    }
    return values;
  }();
  return table[static_cast<__half_raw>(v).x];
}

/// What the hardware asks of an address and a row length.
template <typename T>
void check(const T* address, unsigned pitch) {
  cuda_on_cpu::require(reinterpret_cast<uintptr_t>(address) % 32 == 0, "a tile is not aligned");
  cuda_on_cpu::require(pitch * sizeof(T) % 16 == 0, "a tile's rows are not aligned");
}

}  // namespace emulated

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment;

template <typename T, typename Layout>
struct fragment<matrix_a, 16, 16, 16, T, Layout> {
  float of_row[16];
};

template <typename T, typename Layout>
struct fragment<matrix_b, 16, 16, 16, T, Layout> {
  float of_columns[16][8];
};

template <>
struct fragment<accumulator, 16, 16, 16, float, void> {
  static constexpr int num_elements = 8;
  float x[8];
};
using Accumulated = fragment<accumulator, 16, 16, 16, float, void>;

inline void fill_fragment(Accumulated& to, float value) {
  for (float& x : to.x) x = value;
}

template <typename T, typename Layout>
void load_matrix_sync(fragment<matrix_a, 16, 16, 16, T, Layout>& to, const T* from,
                      unsigned pitch) {
  constexpr bool is_row_major = std::is_same_v<Layout, row_major>;
  emulated::check(from, pitch);
  for (int k = 0; k < 16; ++k)
    to.of_row[k] = emulated::decode(is_row_major ? from[emulated::row() * pitch + k]
                                                 : from[k * pitch + emulated::row()]);
}

template <typename T, typename Layout>
void load_matrix_sync(fragment<matrix_b, 16, 16, 16, T, Layout>& to, const T* from,
                      unsigned pitch) {
  constexpr bool is_row_major = std::is_same_v<Layout, row_major>;
  emulated::check(from, pitch);
  for (int k = 0; k < 16; ++k) {
    for (int c = 0; c < 8; ++c) {
      const int column = emulated::column() + c;
      to.of_columns[k][c] =
          emulated::decode(is_row_major ? from[k * pitch + column] : from[column * pitch + k]);
    }
  }
}

template <typename T, typename LeftLayout, typename RightLayout>
void mma_sync(Accumulated& to, const fragment<matrix_a, 16, 16, 16, T, LeftLayout>& left,
              const fragment<matrix_b, 16, 16, 16, T, RightLayout>& right, const Accumulated& add) {
  Accumulated sum = add;
  for (int k = 0; k < 16; ++k)
    for (int c = 0; c < 8; ++c) sum.x[c] += left.of_row[k] * right.of_columns[k][c];
  to = sum;
}

inline void store_matrix_sync(float* to, const Accumulated& from, unsigned pitch, layout_t layout) {
  emulated::check(to, pitch);
  for (int c = 0; c < 8; ++c) {
    const int row = emulated::row(), column = emulated::column() + c;
    to[layout == mem_row_major ? row * pitch + column : column * pitch + row] = from.x[c];
  }
}

}  // namespace nvcuda::wmma
