// Dropout bits: drawn a block at a time, for draw.cpp; applied a row at a time, for slabs.cpp.
//
// Bit j%8 of byte j/8 of a row belongs to element j; 1 = kept. The bits depend on the seed and
// their place alone, so any number of threads draws the same.
#pragma once

#include <cstdint>

namespace reslora::ops {

/// What one generator draws.
constexpr int64_t kBitBlockBytes = 2048;

/// Fills the blocks [first, last) of `bytes` bytes; each bit is 1 with probability level / 65536;
/// level > 0.
void draw_bit_blocks(uint64_t seed, uint32_t level, int64_t first, int64_t last, int64_t bytes,
                     uint8_t* bits);

/// out[j] = bit j of the row ? in[j] : 0, for a row of n elements of `element_size` 2, 4 or 8
/// bytes. `out` may be `in`. A dropped NaN or infinity becomes 0.
void apply_bit_row(const uint8_t* bits, const void* in, int64_t n, int64_t element_size, void* out);

}  // namespace reslora::ops
