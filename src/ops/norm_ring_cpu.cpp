// `record_norms` on the CPU: two norms into the next column of a ring.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>

#include "core/check.h"
#include "ops/adapt_kernels.h"
#include "ops/norm_ring.h"

namespace reslora::ops {
namespace {

void record_norms_cpu(const Tensor& norms, const Tensor& ring, const Tensor& count) {
  check_record_norms(norms, ring, count);
  const int64_t size = ring.size(1);
  auto* written = count.mutable_data_ptr<int64_t>();
  auto* columns = ring.mutable_data_ptr<float>();
  const Tensor dense = norms.contiguous();
  const auto* values = dense.const_data_ptr<float>();
  const std::lock_guard<std::mutex> lock(ring_mutex());
  RESLORA_CHECK(*written >= 0 && *written < std::numeric_limits<int64_t>::max(),
                "[record_norms] count must be a number of forwards, and one more must fit; got {}",
                *written);
  const int64_t column = *written % size;
  columns[column] = values[0];
  columns[size + column] = values[1];
  ++*written;
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, CPU, m) {
  if (is_second_copy()) return;
  m.impl("record_norms", record_norms_cpu);
}

}  // namespace reslora::ops
