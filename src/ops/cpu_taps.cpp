// Taps on the CPU, in loops: for matrices of a few columns a call of ATen costs more than its work.
#include "ops/cpu_taps.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace reslora::ops {
namespace {

/// Some columns of u, dense.
Tensor columns_copy(const Tensor& u, const Range& columns) {
  const int64_t T = u.size(0), stride = u.stride(0);
  Tensor out = at::empty({T, columns.size}, u.options());
  const float* from = u.const_data_ptr<float>() + columns.first;
  float* to = out.mutable_data_ptr<float>();
  for (int64_t row = 0; row < T; ++row) to = std::copy_n(from + row * stride, columns.size, to);
  return out;
}

}  // namespace

bool is_plain(const Tensor& t) { return t.scalar_type() == at::kFloat && t.is_cpu(); }

Tensor plain(const Tensor& t, const Tensor& like) {
  return is_plain(t) && t.is_contiguous() ? t : t.to(like.options()).contiguous();
}

void add_in_fp32(const Tensor& sum, const Tensor& addend) {
  const Tensor dense = plain(as_matrix(addend), sum);
  const float* values = dense.const_data_ptr<float>();
  float* to = sum.mutable_data_ptr<float>();
  for (int64_t i = 0, n = sum.numel(); i < n; ++i) to[i] += values[i];
}

TapsTaken take_taps_on_cpu(const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own) {
  if (u.scalar_type() != at::kFloat) return kAtenKernels.take_taps(u, members, own);
  TapsTaken taken;
  for (size_t g = 0; g < members.size(); ++g) {
    const Member& member = members[g];
    const Range rest = tap_columns(own, g, u.size(1));
    // u itself may be one result of a member that is alone.
    const bool is_s = members.size() == 1 && rest.size == 0 && member.taps.empty();
    const bool is_tap = members.size() == 1 && member.keep_tap && !is_s;
    Tensor s = is_s ? u : columns_copy(u, own[g]), tap;
    if (rest.size > 0 || member.keep_tap)
      tap = is_tap ? u : columns_copy(u, rest.size > 0 ? rest : own[g]);
    for (const Tensor& one : member.taps) add_in_fp32(s, one);
    taken.emplace_back(std::move(s), std::move(tap));
  }
  return taken;
}

void write_du_in_fp32(const MemberGrads& member, const Tensor& ds, const Tensor& du) {
  const Tensor given = member.gtap ? plain(as_matrix(*member.gtap), ds) : Tensor();
  const int64_t R = ds.size(1), rest = du.size(1) - R;
  const float* from = ds.const_data_ptr<float>();
  const float* gtap = given.defined() ? given.const_data_ptr<float>() : nullptr;
  for (int64_t row = 0; row < ds.size(0); ++row, from += R) {
    float* to = du.mutable_data_ptr<float>() + row * du.stride(0);
    std::copy_n(from, R, to);
    if (rest > 0 && gtap) std::copy_n(gtap + row * rest, rest, to + R);
    if (rest > 0 && !gtap) std::fill_n(to + R, rest, 0.0f);
    if (rest == 0 && member.keep_tap && gtap)
      for (int64_t k = 0; k < R; ++k) to[k] += gtap[row * R + k];
  }
}

}  // namespace reslora::ops
