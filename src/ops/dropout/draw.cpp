// Dropout bits from one number of torch's default generator of the CPU, drawn by its threads.
#include "ops/dropout/draw.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <mutex>

#include "ops/dropout/bit_lanes.h"

namespace reslora::ops {

using at::Tensor;

Tensor draw_bits(const Tensor& x, double keep) {
  uint64_t seed = 0;
  {
    auto* generator = at::get_generator_or_default<at::CPUGeneratorImpl>(
        std::nullopt, at::detail::getDefaultCPUGenerator());
    std::lock_guard<std::mutex> lock(generator->mutex_);
    seed = generator->random64();
  }
  const int64_t row_bytes = (x.size(1) + 7) / 8;
  Tensor bits = at::empty({x.size(0), row_bytes}, x.options().dtype(at::kByte));
  auto* data = bits.data_ptr<uint8_t>();
  const auto level = static_cast<uint32_t>(std::lround(keep * 65536.0));
  const int64_t bytes = bits.numel();
  at::parallel_for(
      0, (bytes + kBitBlockBytes - 1) / kBitBlockBytes, /*grain_size=*/4,
      [&](int64_t first, int64_t last) { draw_bit_blocks(seed, level, first, last, bytes, data); });
  return bits;
}

}  // namespace reslora::ops
