// `adapt` on CUDA: which kernels serve x, and what only the device can answer them.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <mutex>
#include <string>

#include "ops/fused_kernels.h"
#include "ops/kernel_choice.h"
#include "ops/pieces.h"

namespace reslora::ops {

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream(); }

cuda::Philox next_philox(const Tensor& x) {
  auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(x.device().index()));
  std::lock_guard<std::mutex> lock(generator->mutex_);
  const at::PhiloxCudaState state = generator->philox_cuda_state(cuda::kPhiloxIncrement);
  if (!state.captured_) return {state.seed_.val, state.offset_.val};
  return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
}

void check_launch(cudaError_t error) {
  C10_CUDA_CHECK(error);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

namespace {

KernelChoice& choice() {
  static KernelChoice one(kFusedKernels, kernel_policy());
  return one;
}

/// The check compares numbers on the host: torch.cuda.set_sync_debug_mode is not meant for it.
class MayWait {
 public:
  MayWait() {
    c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED);
  }
  ~MayWait() { c10::cuda::warning_state().set_sync_debug_mode(before_); }

 private:
  const c10::cuda::SyncDebugMode before_ = c10::cuda::warning_state().get_sync_debug_mode();
};

/// The kernels for x; the first use of a type on a device checks them.
const DeviceKernels& kernels_for(const Tensor& x) {
  // The dispatcher comes here for any argument on CUDA; x may be elsewhere, with its products.
  if (!x.is_cuda() || !has_element(x)) return kAtenKernels;
  if (choice().knows(x)) return choice().of(x, true);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
    return choice().of(x, false);
  const MayWait guard;
  return choice().of(x, true);
}

std::string kernels_on_cuda(const Tensor& x) {
  const c10::OptionalDeviceGuard guard(x.device());
  const MayWait may_wait;
  return choice().describe(x);
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, CUDA, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_with<kernels_for>);
  m.impl("adapt_backward", adapt_backward_with<kernels_for>);
  m.impl("record_norms", record_norms_fused);
  m.impl("kernels_of", kernels_on_cuda);
}

}  // namespace reslora::ops
