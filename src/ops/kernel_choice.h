// Which kernels a device uses: its own, or ATen's.
//
// RESLORA_KERNELS=auto (the default) takes a device's own kernels once they have agreed with ATen
// on small random data; `fused` takes them unseen; `aten` never takes them. A check that fails
// warns once and leaves ATen's form in use, so a wrong kernel costs speed and nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <reslora/export.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "ops/adapt_kernels.h"

namespace reslora::ops {

enum class KernelPolicy { kAuto, kFused, kAten };

/// What RESLORA_KERNELS says; refuses a word that it does not know. `name` null means auto.
RESLORA_API KernelPolicy kernel_policy_from(const char* name);

/// kernel_policy_from the environment, as it was when first asked for.
KernelPolicy kernel_policy();

/// Runs every function of `kernels` that a type has on small random data and compares with ATen:
/// both against fp64. Returns what differs or what was thrown in one sentence, or nothing. The
/// generators of the user give the same numbers afterwards. Waits for the device.
RESLORA_API std::string disagreement(const DeviceKernels& kernels, at::Device device,
                                     at::ScalarType type);

/// A device's kernels and, for each device and type, whether they may be used. Safe for threads.
class RESLORA_API KernelChoice {
 public:
  KernelChoice(const DeviceKernels& kernels, KernelPolicy policy)
      : kernels_(kernels), policy_(policy) {}

  /// The kernels for x's device and type. Where they are still to be checked and `can_check` is
  /// false (a CUDA graph is captured), ATen's this time, with one warning.
  const DeviceKernels& of(const at::Tensor& x, bool can_check);

  /// True where `of` needs no check for x's device and type any more.
  bool knows(const at::Tensor& x);

  /// Which kernels x's device and type get and why, for people. Checks them where that is to do.
  std::string describe(const at::Tensor& x);

 private:
  const DeviceKernels& kernels_;
  const KernelPolicy policy_;
  std::mutex mutex_;
  std::map<std::pair<c10::DeviceIndex, at::ScalarType>, std::string> differences_;  // empty: none
  bool has_told_of_capture_ = false;
};

}  // namespace reslora::ops
