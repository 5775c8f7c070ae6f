// Inside of the op `adapt`: its arguments, and what a device does its own way.
//
// adapt.cpp evaluates the op with ATen GEMMs on any device; what stands beside the big GEMMs
// differs between devices, so a device supplies a `DeviceKernels`. All matrices here are 2-D: x [T,
// in]. What is exported is used by tests of kernels that are compiled apart.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/SmallVector.h>
#include <reslora/export.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace reslora::ops {

using OptTensor = std::optional<at::Tensor>;
using at::Tensor;
using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

/// True where another copy of this library registered the ops before this one was loaded. Whatever
/// registers asks first: a second copy leaves the kernels alone, and `check_single_copy` tells.
bool is_second_copy();

// ---- The op's arguments, as the dispatcher hands them over --------------------------------------
//
// One call evaluates one layer, or several members that read the same x. What belongs to a member
// stands in lists; `layout` says how much of each list is whose. See include/reslora/ops.h.

/// kLayout integers for each member: Base, number of A, of B, of taps, keep_tap.
constexpr size_t kLayout = 5;
enum Base : int64_t { kWeight = 0, kWeightAndBias = 1, kBaseOut = 2 };

/// kGradLayout integers for each member: which of `given` it has (bits of Given), number of A, of
/// B, keep_tap.
constexpr size_t kGradLayout = 4;
enum Given : int64_t { kGy = 1, kGs = 2, kGtap = 4, kGivenWeight = 8 };

// Returns y, s, tap for each member, then bits and norms.
using AdaptSchema = std::vector<Tensor>(const Tensor& x, at::TensorList bases,
                                        at::IntArrayRef layout, at::TensorList A, at::TensorList B,
                                        at::ArrayRef<double> scaling, at::TensorList taps,
                                        double dropout, const OptTensor& bits, bool want_norms);
// Returns dx, ds of each member, dA, dB. needs = {x, A, B}: which gradients are wanted.
using BackwardSchema = Gradients(at::TensorList given, at::IntArrayRef layout, const Tensor& x,
                                 at::TensorList s, at::TensorList A, at::TensorList B,
                                 at::ArrayRef<double> scaling, const OptTensor& bits,
                                 double dropout, std::array<bool, 3> needs);

/// A layer of a call of `adapt`. Null where there is none.
struct Member {
  const Tensor* weight = nullptr;
  const Tensor* bias = nullptr;
  const Tensor* base_out = nullptr;
  at::TensorList A;
  at::TensorList B;
  at::ArrayRef<double> scaling;
  at::TensorList taps;
  bool keep_tap = false;

  const Tensor& base() const { return weight ? *weight : *base_out; }
  bool has_tap_rows() const { return A.size() > B.size(); }
  /// True where `adapt` returns a tap of its own.
  bool returns_tap() const { return has_tap_rows() || keep_tap; }
};

struct AdaptArgs {
  const Tensor& x;
  c10::SmallVector<Member, 3> members;
  at::TensorList A;  // of all members
  double dropout;
  const OptTensor& bits;
  bool want_norms;
};

/// Sorts the lists by member. Throws where the layout does not fit them.
RESLORA_API AdaptArgs sorted_args(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                                  at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                                  at::TensorList taps, double dropout, const OptTensor& bits,
                                  bool want_norms);

/// What the backward of a member reads. Null where there is none.
struct MemberGrads {
  const Tensor* gy = nullptr;
  const Tensor* gs = nullptr;
  const Tensor* gtap = nullptr;
  const Tensor* weight = nullptr;
  at::TensorList A;
  at::TensorList B;
  at::ArrayRef<double> scaling;
  const Tensor* s = nullptr;
  bool keep_tap = false;
};

struct BackwardArgs {
  const Tensor& x;
  c10::SmallVector<MemberGrads, 3> members;
  at::TensorList A;  // of all members
  const OptTensor& bits;
  double dropout;
  std::array<bool, 3> needs;
};

RESLORA_API BackwardArgs sorted_grads(at::TensorList given, at::IntArrayRef layout, const Tensor& x,
                                      at::TensorList s, at::TensorList A, at::TensorList B,
                                      at::ArrayRef<double> scaling, const OptTensor& bits,
                                      double dropout, std::array<bool, 3> needs);

// ---- What a device does its own way -------------------------------------------------------------

/// Some columns of a matrix.
struct Range {
  int64_t first;
  int64_t size;
};

/// The columns of u that are the tap of member g: those between its own and the next member's.
/// `own` says where the members' own columns are, `width` is that of u.
inline Range tap_columns(at::ArrayRef<Range> own, size_t g, int64_t width) {
  const int64_t first = own[g].first + own[g].size;
  return {first, (g + 1 < own.size() ? own[g + 1].first : width) - first};
}

/// s [T, R] of each member, and the tap that it hands on, or an undefined tensor.
using TapsTaken = c10::SmallVector<std::pair<Tensor, Tensor>, 3>;

/// Dropout of x: which elements are kept, and with what probability they were. Bits are uint8
/// [T, ceil(in/8)], bit j%8 of byte j/8 belongs to element j, 1 = kept.
struct Mask {
  bool is_on = false;
  double keep = 1;
  at::Tensor bits;  // undefined until they are drawn

  const at::Tensor* pointer() const { return is_on ? &bits : nullptr; }
};

/// What a device does its own way: all but the big GEMMs. "Kept x" is x with dropped elements 0,
/// and x itself without dropout.
struct DeviceKernels {
  /// Returns u [T, RA] = kept x A^T / keep for the blocks of A below one another. Where bits are
  /// wanted and not given it draws them, from the default generator of x's device. Where `norms` is
  /// not null it becomes fp32 [2 G]: |x|_F and |u[:, own_g]|_F for each of the G ranges of columns.
  at::Tensor (*project)(const at::Tensor& x, Mask& mask, at::TensorList A, at::ArrayRef<Range> own,
                        at::Tensor* norms);
  /// Returns for each member s [T, R] = its own columns of u + its taps, and the tap that it hands
  /// on: its columns beyond those, where there are such, else its own with `keep_tap`. No two
  /// results share memory. `own` says where the members' own columns are; u is dense.
  TapsTaken (*take_taps)(const at::Tensor& u, at::ArrayRef<Member> members,
                         at::ArrayRef<Range> own);
  /// Returns [T, out] = base + the sum over blocks k of scaling_k s_k B_k^T; base is null, [out] or
  /// [T, out].
  at::Tensor (*expand)(const at::Tensor& s, at::TensorList B, at::ArrayRef<double> scaling,
                       const at::Tensor* base);
  /// Returns ds [T, R], its columns for block k being scaling_k gy B_k, plus gs, and, where wanted,
  /// a gradient for each block of B. Where du [T, rows of A] is not null, the gradient of the
  /// member's columns of u is written there: ds, with gtap added where the tap was kept, and gtap
  /// beside it where it has columns of its own. What is not given counts as 0.
  std::pair<at::Tensor, std::vector<at::Tensor>> (*expand_grad)(const MemberGrads& member,
                                                                bool needs_dB,
                                                                const at::Tensor* du);
  /// Returns a gradient for each block of A: du^T kept x / keep.
  std::vector<at::Tensor> (*project_grad)(const at::Tensor& du, const at::Tensor& x,
                                          const Mask& mask, at::TensorList A);
  /// Returns the part of dx from the blocks of A: kept (du A) / keep.
  at::Tensor (*project_back)(const at::Tensor& du, at::TensorList A, const Mask& mask);
};

extern const DeviceKernels kCpuKernels;               // adapt_cpu.cpp
extern const DeviceKernels kCudaKernels;              // adapt_cuda.cpp, where there is CUDA
RESLORA_API extern const DeviceKernels kAtenKernels;  // adapt_composite.cpp; tests compare with it

/// Refuses what does not fit together, in one sentence; symbolic shapes are allowed.
void check_adapt(const AdaptArgs& args);
RESLORA_API void check_record_norms(const at::Tensor& norms, const at::Tensor& ring,
                                    const at::Tensor& count);

/// x [..., n] as a matrix [T, n] whose rows or columns are dense.
RESLORA_API at::Tensor as_matrix(const at::Tensor& x);

/// fp32 [2 G]: |x|_F and |u[:, own_g]|_F for each range of columns.
RESLORA_API at::Tensor norms_of(const at::Tensor& x, const at::Tensor& u, at::ArrayRef<Range> own);

/// Writes the gradient of a member's columns of u, as `expand_grad` does, from ds.
void write_du(const MemberGrads& member, const at::Tensor& ds, at::Tensor du);

/// t with dense rows: t itself, or a copy.
RESLORA_API at::Tensor with_dense_rows(const at::Tensor& t);

RESLORA_API bool is_uniform(at::ArrayRef<double> scaling);

/// The sum of the blocks' sizes in a dimension: RA of blocks of A (0), R of blocks of B (1).
RESLORA_API int64_t total_size(at::TensorList blocks, int64_t dim);

/// The blocks side by side in `dim`, in the dtype and on the device of `like`.
RESLORA_API at::Tensor stack(at::TensorList blocks, int64_t dim, const at::Tensor& like);

/// Cuts a stacked gradient into one tensor per block, in the block's own dtype and device. The
/// blocks are copies: outputs of an op must not share memory.
RESLORA_API std::vector<at::Tensor> unstack(const at::Tensor& stacked, at::TensorList blocks,
                                            int64_t dim);

RESLORA_API std::vector<Tensor> evaluate(const AdaptArgs& args, const DeviceKernels& kernels);
RESLORA_API Gradients evaluate_backward(const BackwardArgs& args, const DeviceKernels& kernels);

/// The op and its backward for a device; `choose` returns the kernels for x.
template <const DeviceKernels& (*choose)(const Tensor& x)>
std::vector<Tensor> adapt_with(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                               at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                               at::TensorList taps, double dropout, const OptTensor& bits,
                               bool want_norms) {
  const c10::OptionalDeviceGuard guard(x.device());
  return evaluate(sorted_args(x, bases, layout, A, B, scaling, taps, dropout, bits, want_norms),
                  choose(x));
}

template <const DeviceKernels& (*choose)(const Tensor& x)>
Gradients adapt_backward_with(at::TensorList given, at::IntArrayRef layout, const Tensor& x,
                              at::TensorList s, at::TensorList A, at::TensorList B,
                              at::ArrayRef<double> scaling, const OptTensor& bits, double dropout,
                              std::array<bool, 3> needs) {
  const c10::OptionalDeviceGuard guard(x.device());
  return evaluate_backward(sorted_grads(given, layout, x, s, A, B, scaling, bits, dropout, needs),
                           choose(x));
}

}  // namespace reslora::ops
