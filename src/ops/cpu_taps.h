// What `adapt` does with taps on the CPU, where it has fp32.
#pragma once

#include "ops/adapt_kernels.h"

namespace reslora::ops {

/// True for fp32 on the CPU.
bool is_plain(const Tensor& t);

/// t as dense fp32 on the CPU: t itself where it is that. (A call of `to` that does nothing costs
/// as much as a small product.)
Tensor plain(const Tensor& t, const Tensor& like);

/// sum += addend; sum is dense fp32.
void add_in_fp32(const Tensor& sum, const Tensor& addend);

/// DeviceKernels::take_taps; ATen's form for other types.
TapsTaken take_taps_on_cpu(const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own);

/// Writes du from ds as `write_du` does; ds is dense fp32.
void write_du_in_fp32(const MemberGrads& member, const Tensor& ds, const Tensor& du);

}  // namespace reslora::ops
