// Inside of the op `adapt`: its arguments, and what a device does its own way.
//
// adapt.cpp evaluates the op with ATen GEMMs on any device; only dropout differs between
// devices, so a device supplies a `DeviceKernels`. All matrices here are 2-D: x [T, in].
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

namespace reslora::ops {

using OptTensor = std::optional<at::Tensor>;
// y, s, tap, bits, norms
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients =
    std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>>;

/// The arguments of `adapt` as the dispatcher hands them over (see include/reslora/ops.h).
struct AdaptArgs {
  const at::Tensor& x;
  const OptTensor& weight;
  const OptTensor& bias;
  const OptTensor& base_out;
  at::TensorList A;
  at::TensorList B;
  at::ArrayRef<double> scaling;
  at::TensorList taps;
  double dropout;
  const OptTensor& bits;
  bool keep_tap;
  bool want_norms;
};

/// The arguments of `adapt_backward`. needs = {x, A, B}: which gradients are wanted; ds always is.
struct BackwardArgs {
  const OptTensor& gy;
  const OptTensor& gs;
  const OptTensor& gtap;
  const at::Tensor& x;
  const OptTensor& weight;
  at::TensorList A;
  at::TensorList B;
  at::ArrayRef<double> scaling;
  const at::Tensor& s;
  const OptTensor& bits;
  double dropout;
  bool keep_tap;
  std::array<bool, 3> needs;
};

/// Dropout, the part that is not a GEMM. `keep` is the probability to keep an element;
/// bits are uint8 [T, ceil(in/8)], bit j%8 of byte j/8 belongs to element j, 1 = kept.
struct DeviceKernels {
  /// Draws the bits from the default generator of x's device.
  at::Tensor (*draw_bits)(const at::Tensor& x, double keep);
  /// out [T, R] = (x * bits) A^T / keep.
  void (*project)(const at::Tensor& x, const at::Tensor& bits, const at::Tensor& A, double keep,
                  at::Tensor& out);
  /// Returns dA [R, in] = du^T (x * bits) / keep.
  at::Tensor (*project_grad)(const at::Tensor& du, const at::Tensor& x, const at::Tensor& bits,
                             double keep);
  /// dx [T, in] = bits * (du A) / keep.
  void (*expand)(const at::Tensor& du, const at::Tensor& A, const at::Tensor& bits, double keep,
                 at::Tensor& dx);
};

extern const DeviceKernels kCpuKernels;   // adapt_cpu.cpp
extern const DeviceKernels kAtenKernels;  // adapt_composite.cpp

/// Refuses what does not fit together, in one sentence; symbolic shapes are allowed.
void check_adapt(const AdaptArgs& args);
void check_record_norms(const at::Tensor& norms, const at::Tensor& ring, const at::Tensor& count);

/// True where `adapt` returns a tap of its own.
inline bool returns_tap(size_t a_blocks, size_t b_blocks, bool keep_tap) {
  return a_blocks > b_blocks || keep_tap;
}

/// The keep probability that is really drawn: 1 - dropout to the nearest 1/65536, at least one.
double keep_probability(double dropout);

Outputs evaluate(const AdaptArgs& args, const DeviceKernels& kernels);
Gradients evaluate_backward(const BackwardArgs& args, const DeviceKernels& kernels);

}  // namespace reslora::ops
