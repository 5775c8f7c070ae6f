// `adapt` on CUDA: the kernels of src/cuda in bf16 and fp16 up to rank 128, ATen for all else.
//
// A kernel is used where it saves a pass over a wide matrix: `project` with dropout or norms,
// `project_back` and `project_grad` with dropout, `expand_grad` up to rank 32, beyond which its
// partial sums cost what it saves. Everything is enqueued on the current stream; nothing waits.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>
#include <mutex>

#include "cuda/launch.h"
#include "ops/adapt_kernels.h"
#include "ops/kernel_choice.h"

namespace reslora::ops {
namespace {

constexpr int64_t kExpandGradRank = cuda::kMaxExpandGradRank;

bool has_kernels(const Tensor& x, int64_t rank) {
  const bool is_16_bit = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return is_16_bit && x.numel() > 0 && rank > 0 && rank <= cuda::kMaxRank;
}

cuda::Type type_of(const Tensor& t) {
  return t.scalar_type() == at::kHalf ? cuda::Type::kHalf : cuda::Type::kBFloat16;
}

/// t [rows, columns] for a kernel that reads it.
cuda::ConstMatrix read(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

/// t [rows, columns] for a kernel that writes it.
cuda::Matrix written(const Tensor& t) {
  return {t.mutable_data_ptr(), t.size(0), t.size(1), t.stride(0)};
}

int multiprocessors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

/// Asks for a workspace and starts the kernel on the current stream.
template <typename Args>
void launch(cudaError_t (*launcher)(const Args&, cudaStream_t), Args args, const Tensor& like) {
  args.multiprocessors = multiprocessors();
  const auto bytes = static_cast<int64_t>(workspace_bytes(args));
  const Tensor workspace = at::empty({bytes}, like.options().dtype(at::kByte));
  args.workspace = bytes ? workspace.mutable_data_ptr() : nullptr;
  C10_CUDA_CHECK(launcher(args, c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

cuda::Philox next_philox(const Tensor& x) {
  auto* generator = at::get_generator_or_default<at::CUDAGeneratorImpl>(
      std::nullopt, at::cuda::detail::getDefaultCUDAGenerator(x.device().index()));
  std::lock_guard<std::mutex> lock(generator->mutex_);
  const at::PhiloxCudaState state = generator->philox_cuda_state(cuda::kPhiloxIncrement);
  if (!state.captured_) return {state.seed_.val, state.offset_.val};
  return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
}

/// The mask for a kernel; makes room for bits that are still to be drawn.
cuda::Mask mask_for(const Tensor& x, Mask& mask) {
  if (!mask.is_on) return {};
  const auto level = static_cast<uint32_t>(std::lround(mask.keep * 65536.0));
  if (mask.bits.defined()) {
    mask.bits = mask.bits.contiguous();
    auto* bits = const_cast<uint8_t*>(mask.bits.const_data_ptr<uint8_t>());  // only read
    return {cuda::Dropout::kGiven, bits, level, {}};
  }
  mask.bits = at::empty({x.size(0), (x.size(1) + 7) / 8}, x.options().dtype(at::kByte));
  return {cuda::Dropout::kDrawn, mask.bits.mutable_data_ptr<uint8_t>(), level, next_philox(x)};
}

/// fp32 [2 G] from the sum of x^2 [1] and from u.
Tensor norms_from(const Tensor& squares, const Tensor& u, at::ArrayRef<Range> own) {
  const Tensor norm = squares.sqrt().squeeze(0);
  std::vector<Tensor> norms;
  for (const Range& range : own) {
    norms.push_back(norm);
    norms.push_back(at::linalg_vector_norm(u.narrow(1, range.first, range.size), 2, std::nullopt,
                                           false, at::kFloat));
  }
  return at::stack(norms);
}

Tensor project(const Tensor& x, Mask& mask, at::TensorList A, at::ArrayRef<Range> own,
               Tensor* norms) {
  if ((!mask.is_on && !norms) || !has_kernels(x, total_size(A, 0)))
    return kAtenKernels.project(x, mask, A, own, norms);
  const Tensor dense = with_dense_rows(x), rows = with_dense_rows(stack(A, 0, x));
  Tensor u = at::empty({x.size(0), rows.size(0)}, x.options());
  Tensor squares;
  if (norms) squares = at::empty({1}, x.options().dtype(at::kFloat));
  const auto alpha = static_cast<float>(mask.is_on ? 1 / mask.keep : 1.0);
  launch(
      cuda::launch_project,
      cuda::ProjectArgs{type_of(x), read(dense), read(rows), written(u), alpha, mask_for(x, mask),
                        norms ? squares.mutable_data_ptr<float>() : nullptr, nullptr, 0},
      x);
  if (norms) *norms = norms_from(squares, u, own);
  return u;
}

Tensor project_back(const Tensor& du, at::TensorList A, const Mask& mask) {
  if (!mask.is_on || !has_kernels(du, du.size(1)) || A[0].size(1) == 0)
    return kAtenKernels.project_back(du, A, mask);
  const Tensor left = with_dense_rows(du), right = with_dense_rows(stack(A, 0, du));
  const Tensor kept = mask.bits.contiguous();
  Tensor out = at::empty({du.size(0), right.size(1)}, du.options());
  const cuda::ConstMatrix no_base = {nullptr, out.size(0), out.size(1), 0};
  C10_CUDA_CHECK(
      cuda::launch_expand({type_of(du), read(left), read(right), written(out), no_base,
                           static_cast<float>(1 / mask.keep), kept.const_data_ptr<uint8_t>()},
                          c10::cuda::getCurrentCUDAStream()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::vector<Tensor> project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                 at::TensorList A) {
  if (!mask.is_on || !has_kernels(x, du.size(1))) return kAtenKernels.project_grad(du, x, mask, A);
  const Tensor rows = with_dense_rows(du), dense = with_dense_rows(x);
  const Tensor bits = mask.bits.contiguous();
  const Tensor dA = at::empty({du.size(1), x.size(1)}, x.options());
  launch(cuda::launch_project_grad,
         cuda::ProjectGradArgs{type_of(x), read(rows), read(dense), written(dA),
                               static_cast<float>(1 / mask.keep), bits.const_data_ptr<uint8_t>(),
                               nullptr, 0},
         x);
  return unstack(dA, A, 0);
}

std::pair<Tensor, std::vector<Tensor>> expand_grad(const Tensor& gy, at::TensorList B,
                                                   at::ArrayRef<double> scaling, const Tensor* s) {
  if (!s || s->size(1) > kExpandGradRank || !has_kernels(gy, s->size(1)) || !is_uniform(scaling))
    return kAtenKernels.expand_grad(gy, B, scaling, s);
  const Tensor stacked = with_dense_rows(stack(B, 1, gy));
  const Tensor dense = with_dense_rows(gy), entered = with_dense_rows(*s);
  const Tensor ds = at::empty({gy.size(0), s->size(1)}, gy.options());
  const Tensor dB = at::empty(stacked.sizes(), gy.options());
  launch(cuda::launch_expand_grad,
         cuda::ExpandGradArgs{type_of(gy), read(dense), read(stacked), read(entered), written(ds),
                              written(dB), static_cast<float>(scaling[0]), nullptr, 0},
         gy);
  return {ds, unstack(dB, B, 1)};
}

}  // namespace

const DeviceKernels kCudaKernels = {project,     kAtenKernels.take_taps, kAtenKernels.expand,
                                    expand_grad, project_grad,           project_back};

namespace {

/// The kernels for x; the first use of a type on a device checks them.
const DeviceKernels& kernels_for(const Tensor& x) {
  // The dispatcher comes here for any argument on CUDA; x may be elsewhere, with its products.
  const bool is_16_bit = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  if (!x.is_cuda() || !is_16_bit) return kAtenKernels;
  static KernelChoice choice(kCudaKernels, kernel_policy());
  const bool is_capturing =
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  return choice.of(x, !is_capturing);
}

}  // namespace

TORCH_LIBRARY_IMPL(reslora, CUDA, m) {
  if (is_second_copy()) return;
  m.impl("adapt", adapt_with<kernels_for>);
  m.impl("adapt_backward", adapt_backward_with<kernels_for>);
}

}  // namespace reslora::ops
