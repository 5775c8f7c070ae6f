// Elements of a type that is known when the kernel runs, as floats.
#pragma once

#include "device.cuh"
#include "elementwise.h"

namespace reslora::cuda {

__device__ inline float load_float(const Strided& m, int64_t place) {
  switch (m.type) {
    case Element::kFloat:
      return load(static_cast<const float*>(m.data) + place);
    case Element::kDouble:
      return static_cast<float>(load(static_cast<const double*>(m.data) + place));
    case Element::kBFloat16:
      return __bfloat162float(load(static_cast<const bfloat16*>(m.data) + place));
    default:
      return __half2float(load(static_cast<const half*>(m.data) + place));
  }
}

/// Writes to a matrix of the kernel's results.
__device__ inline void store_float(const Strided& m, int64_t place, float value) {
  void* data = const_cast<void*>(m.data);
  switch (m.type) {
    case Element::kFloat:
      return store(static_cast<float*>(data) + place, value);
    case Element::kDouble:
      return store(static_cast<double*>(data) + place, static_cast<double>(value));
    case Element::kBFloat16:
      return store(static_cast<bfloat16*>(data) + place, from_float<bfloat16>(value));
    default:
      return store(static_cast<half*>(data) + place, from_float<half>(value));
  }
}

}  // namespace reslora::cuda
