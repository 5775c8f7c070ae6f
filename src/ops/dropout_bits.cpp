// Philox in lanes, biased bits from fair ones, and masks by table look-up.
#include "ops/dropout_bits.h"

#include <array>
#include <cstring>

// The loops below are compiled for three instruction sets; the loader picks at run time.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define RESLORA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RESLORA_CLONES
#endif
// What a clone calls must be compiled with it.
#define RESLORA_INLINE __attribute__((always_inline)) inline

namespace reslora::ops {
namespace {

constexpr int kLanes = 16;  // Philox calls side by side, so that compilers vectorise the rounds
using Words = uint32_t[4][kLanes];
static_assert(sizeof(Words) == kBitBlockBytes);

/// Philox4x32-7 (Salmon et al., SC 2011; 7 rounds pass BigCrush) on kLanes counters at once.
RESLORA_INLINE void philox(Words& counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * counter[0][i];
      const uint64_t p1 = uint64_t{0xCD9E8D57} * counter[2][i];
      counter[0][i] = static_cast<uint32_t>(p1 >> 32) ^ counter[1][i] ^ key0;
      counter[2][i] = static_cast<uint32_t>(p0 >> 32) ^ counter[3][i] ^ key1;
      counter[1][i] = static_cast<uint32_t>(p1);
      counter[3][i] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

/// 4 * kLanes words of 32 bits, each bit 1 with probability level / 65536, level < 65536.
///
/// Works on whole words: from the lowest binary digit of the level to the highest, a digit 1 ORs a
/// word of fair coins, a digit 0 ANDs one, which halves the distance each time.
RESLORA_INLINE void biased_words(uint64_t seed, uint32_t level, uint64_t block, Words& result) {
  for (int w = 0; w < 4; ++w)
    for (int i = 0; i < kLanes; ++i) result[w][i] = 0;
  int digit = 0;
  while (digit < 15 && !((level >> digit) & 1)) ++digit;  // trailing zeros only AND zero with coins
  for (; digit < 16; ++digit) {
    Words coins;
    for (int i = 0; i < kLanes; ++i) {
      coins[0][i] = static_cast<uint32_t>(block);
      coins[1][i] = static_cast<uint32_t>(block >> 32);
      coins[2][i] = static_cast<uint32_t>(i);
      coins[3][i] = static_cast<uint32_t>(digit);
    }
    philox(coins, seed);
    const uint32_t is_one = (level >> digit) & 1 ? 0xFFFFFFFF : 0;
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < kLanes; ++i)
        result[w][i] = (result[w][i] & coins[w][i]) | (is_one & (result[w][i] | coins[w][i]));
  }
}

template <typename Word>
std::array<std::array<Word, 8>, 256> make_masks() {
  std::array<std::array<Word, 8>, 256> masks{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0; bit < 8; ++bit) masks[byte][bit] = (byte >> bit) & 1 ? ~Word{0} : Word{0};
  return masks;
}

template <typename Word>
RESLORA_INLINE void apply_row(const uint8_t* bits, const Word* in, int64_t n, Word* out) {
  static const auto masks = make_masks<Word>();
  const int64_t whole = n / 8;
  for (int64_t byte = 0; byte < whole; ++byte) {
    const auto& mask = masks[bits[byte]];
    for (int k = 0; k < 8; ++k) out[8 * byte + k] = in[8 * byte + k] & mask[k];
  }
  for (int64_t j = 8 * whole; j < n; ++j) out[j] = in[j] & masks[bits[whole]][j % 8];
}

}  // namespace

RESLORA_CLONES
void draw_bit_blocks(uint64_t seed, uint32_t level, int64_t first, int64_t last, int64_t bytes,
                     uint8_t* bits) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * kBitBlockBytes;
    const int64_t n = bytes - start < kBitBlockBytes ? bytes - start : kBitBlockBytes;
    if (level >= 65536) {
      std::memset(bits + start, 0xFF, static_cast<size_t>(n));
      continue;
    }
    Words words;
    biased_words(seed, level, static_cast<uint64_t>(block), words);
    std::memcpy(bits + start, words, static_cast<size_t>(n));
  }
}

RESLORA_CLONES
void apply_bit_row(const uint8_t* bits, const void* in, int64_t n, int64_t element_size,
                   void* out) {
  switch (element_size) {
    case 2:
      return apply_row(bits, static_cast<const uint16_t*>(in), n, static_cast<uint16_t*>(out));
    case 4:
      return apply_row(bits, static_cast<const uint32_t*>(in), n, static_cast<uint32_t*>(out));
    default:
      return apply_row(bits, static_cast<const uint64_t*>(in), n, static_cast<uint64_t*>(out));
  }
}

}  // namespace reslora::ops
