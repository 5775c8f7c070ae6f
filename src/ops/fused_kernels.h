// The op's device functions out of the kernels of src/cuda.
//
// What only a CUDA device can answer stands in adapt_cuda.cpp; a test answers it for kernels that
// run on the CPU, so that all of the op's path on CUDA is tested without a GPU.
#pragma once

#include "cuda/launch.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {

extern const DeviceKernels kFusedKernels;

/// Writes two norms into the next column of a ring, in one launch; see record_norms in ops.h.
void record_norms_fused(const Tensor& norms, const Tensor& ring, const Tensor& count);

// ---- What the device answers --------------------------------------------------------------------

/// The number of multiprocessors of the current device.
int multiprocessors();
/// The stream that kernels are enqueued on.
cudaStream_t current_stream();
/// Where the random numbers for the bits of x start; the generator advances.
cuda::Philox next_philox(const Tensor& x);
/// Throws what went wrong in a launch.
void check_launch(cudaError_t error);

}  // namespace reslora::ops
