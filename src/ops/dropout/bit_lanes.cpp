// Random words in lanes, biased bits from fair ones, and masks by table look-up.
#include "ops/dropout/bit_lanes.h"

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

constexpr int kLanes = 16;  // generators side by side, so that compilers vectorise them
using Words = uint32_t[kLanes];
static_assert(kBitBlockBytes % sizeof(Words) == 0);

/// Mixes a counter into 64 well-spread bits (the finaliser of SplitMix64, Steele et al. 2014).
RESLORA_INLINE uint64_t mixed(uint64_t counter) {
  counter = (counter ^ (counter >> 30)) * 0xBF58476D1CE4E5B9;
  counter = (counter ^ (counter >> 27)) * 0x94D049BB133111EB;
  return counter ^ (counter >> 31);
}

/// xoshiro128++ (Blackman and Vigna 2021) in every lane; a block's state is a function of the seed
/// and the block, so that blocks can be drawn in any order.
struct Generator {
  Words state[4];

  RESLORA_INLINE void start(uint64_t seed, uint64_t block) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t counter = seed + 0x9E3779B97F4A7C15 * (2 * (block * kLanes + i) + 1);
      const uint64_t low = mixed(counter), high = mixed(counter + 0x9E3779B97F4A7C15);
      state[0][i] = static_cast<uint32_t>(low);
      state[1][i] = static_cast<uint32_t>(low >> 32);
      state[2][i] = static_cast<uint32_t>(high);
      state[3][i] = static_cast<uint32_t>(high >> 32);
    }
  }

  RESLORA_INLINE void draw(Words& words) {
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t sum = state[0][i] + state[3][i];
      words[i] = ((sum << 7) | (sum >> 25)) + state[0][i];
      const uint32_t shifted = state[1][i] << 9;
      state[2][i] ^= state[0][i];
      state[3][i] ^= state[1][i];
      state[1][i] ^= state[2][i];
      state[0][i] ^= state[3][i];
      state[2][i] ^= shifted;
      state[3][i] = (state[3][i] << 11) | (state[3][i] >> 21);
    }
  }
};

/// kLanes words of 32 bits, each bit 1 with probability level / 65536, 0 < level < 65536.
///
/// Works on whole words: from the lowest binary digit of the level that is 1 to the highest, a
/// digit 1 ORs a word of fair coins, a digit 0 ANDs one, which halves the distance each time.
RESLORA_INLINE void draw_biased(Generator& generator, uint32_t level, Words& result) {
  for (int i = 0; i < kLanes; ++i) result[i] = 0;
  for (int digit = __builtin_ctz(level); digit < 16; ++digit) {
    Words coins;
    generator.draw(coins);
    const uint32_t is_one = (level >> digit) & 1 ? 0xFFFFFFFF : 0;
    for (int i = 0; i < kLanes; ++i)
      result[i] = (result[i] & coins[i]) | (is_one & (result[i] | coins[i]));
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
    const int64_t end = bytes - start < kBitBlockBytes ? bytes : start + kBitBlockBytes;
    if (level >= 65536) {
      std::memset(bits + start, 0xFF, static_cast<size_t>(end - start));
      continue;
    }
    Generator generator;
    generator.start(seed, static_cast<uint64_t>(block));
    for (int64_t at = start; at < end; at += sizeof(Words)) {
      Words words;
      draw_biased(generator, level, words);
      const int64_t left = end - at, whole = sizeof(Words);
      std::memcpy(bits + at, words, static_cast<size_t>(left < whole ? left : whole));
    }
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
