// The choice of kernels: what the check notices, what it leaves alone, and the warning.
#include "ops/kernel_choice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "testing.h"

namespace reslora::ops {
namespace {

using at::Tensor;
using reslora::testing::Warnings;

std::vector<Tensor> negated_project_grad(const Tensor& du, const Tensor& x, const Mask& mask,
                                         at::TensorList A) {
  std::vector<Tensor> dA = kAtenKernels.project_grad(du, x, mask, A);
  for (Tensor& one : dA) one.neg_();
  return dA;
}

std::pair<Tensor, std::vector<Tensor>> dB_with_a_wrong_column(const MemberGrads& member,
                                                              bool needs_dB, const Tensor* du) {
  auto grads = kAtenKernels.expand_grad(member, needs_dB, du);
  for (Tensor& dB : grads.second) dB.select(1, dB.size(1) - 1).zero_();
  return grads;
}

Tensor nan_expand(const Tensor& s, at::TensorList B, at::ArrayRef<double> scaling,
                  const Tensor* base) {
  Tensor out = kAtenKernels.expand(s, B, scaling, base);
  out[-1][-1] = NAN;
  return out;
}

Tensor project_that_draws_too_few(const Tensor& x, Mask& mask, at::TensorList A,
                                  at::ArrayRef<Range> own, Tensor* norms) {
  const bool draws = !mask.bits.defined();
  const Tensor u = kAtenKernels.project(x, mask, A, own, norms);
  if (!draws) return u;
  mask.bits = mask.bits.bitwise_and(0x7f);
  return kAtenKernels.project(x, mask, A, own, norms);
}

Tensor project_with_other_bits(const Tensor& x, Mask& mask, at::TensorList A,
                               at::ArrayRef<Range> own, Tensor* norms) {
  const bool draws = !mask.bits.defined();
  const Tensor u = kAtenKernels.project(x, mask, A, own, norms);
  if (draws) mask.bits = mask.bits.flip(0);
  return u;
}

Tensor throwing_project(const Tensor&, Mask&, at::TensorList, at::ArrayRef<Range>, Tensor*) {
  TORCH_CHECK(false, "no kernel image is available\nand more lines");
}

/// ATen's kernels with one function replaced.
template <typename Function>
DeviceKernels with(Function DeviceKernels::*member, Function function) {
  DeviceKernels kernels = kAtenKernels;
  kernels.*member = function;
  return kernels;
}

std::string on_cpu(const DeviceKernels& kernels) {
  return disagreement(kernels, at::kCPU, at::kBFloat16);
}

TEST(KernelChoice, FindsNothingWhereKernelsAreRight) {
  for (const auto type : {at::kBFloat16, at::kHalf, at::kFloat})
    EXPECT_EQ(disagreement(kAtenKernels, at::kCPU, type), "") << type;
}

TEST(KernelChoice, NamesWhatIsWrong) {
  using ::testing::HasSubstr;
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project_grad, negated_project_grad)),
              HasSubstr("at rank 9 project_grad is off by"));
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand_grad, dB_with_a_wrong_column)),
              HasSubstr("dB of expand_grad is off by"));
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand, nan_expand)), HasSubstr("expand is off by nan"));
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project, project_with_other_bits)),
              HasSubstr("project with bits of its own is off by"));
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project, project_that_draws_too_few)),
              HasSubstr("of the elements where 0.75 was asked"));
  EXPECT_EQ(on_cpu(with(&DeviceKernels::project, throwing_project)),
            "at rank 9 the check ended with: no kernel image is available");
}

// ---- Each path that the op takes is tried: one that is wrong is noticed and named

using Project = decltype(DeviceKernels::project);
using ExpandGrad = decltype(DeviceKernels::expand_grad);

TEST(KernelChoice, TriesProjectionsWithAndWithoutDropoutAndNorms) {
  using ::testing::HasSubstr;
  const Project zeros_without_dropout = [](const Tensor& x, Mask& mask, at::TensorList A,
                                           at::ArrayRef<Range> own, Tensor* norms) {
    const Tensor u = kAtenKernels.project(x, mask, A, own, norms);
    return !mask.is_on && norms ? u.zero_() : u;
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project, zeros_without_dropout)),
              HasSubstr("project without dropout, with norms is off"));
  const Project norms_of_the_first = [](const Tensor& x, Mask& mask, at::TensorList A,
                                        at::ArrayRef<Range> own, Tensor* norms) {
    const Tensor u = kAtenKernels.project(x, mask, A, own, norms);
    if (norms && !mask.is_on) (*norms)[3].zero_();
    return u;
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project, norms_of_the_first)),
              HasSubstr("the norms of project without dropout is off"));
  const Project wrong_above_128_rows = [](const Tensor& x, Mask& mask, at::TensorList A,
                                          at::ArrayRef<Range> own, Tensor* norms) {
    Tensor u = kAtenKernels.project(x, mask, A, own, norms);
    if (u.size(1) > 128) u.narrow(1, 128, u.size(1) - 128).neg_();
    return u;
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project, wrong_above_128_rows)),
              HasSubstr("at rank 140 project, with norms is off"));
  const auto masked = [](const Tensor& du, at::TensorList A, const Mask& mask) {
    const Tensor out = kAtenKernels.project_back(du, A, mask);
    return mask.is_on ? out : at::zeros_like(out);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::project_back, +masked)),
              HasSubstr("project_back without dropout is off"));
}

TEST(KernelChoice, TriesTaps) {
  using ::testing::HasSubstr;
  const auto two_taps = [](const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own) {
    std::vector<Member> fewer(members.begin(), members.end());
    for (Member& member : fewer) member.taps = member.taps.slice(0, member.taps.size() / 2);
    return kAtenKernels.take_taps(u, fewer, own);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::take_taps, +two_taps)),
              HasSubstr("s of take_taps is off"));
  const auto no_tap = [](const Tensor& u, at::ArrayRef<Member> members, at::ArrayRef<Range> own) {
    TapsTaken taken = kAtenKernels.take_taps(u, members, own);
    for (auto& pair : taken)
      if (pair.second.defined()) pair.second.zero_();
    return taken;
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::take_taps, +no_tap)),
              HasSubstr("the tap of take_taps is off"));
}

TEST(KernelChoice, TriesScalingsAndWhatIsAddedInTheBackward) {
  using ::testing::HasSubstr;
  const auto one_scaling = [](const Tensor& s, at::TensorList B, at::ArrayRef<double> scaling,
                              const Tensor* base) {
    return kAtenKernels.expand(s, B, std::vector<double>(B.size(), scaling[0]), base);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand, +one_scaling)),
              HasSubstr("expand with two scalings is off"));
  const ExpandGrad one_scaling_back = [](const MemberGrads& member, bool needs_dB,
                                         const Tensor* du) {
    MemberGrads same = member;
    const std::vector<double> scaling(member.B.size(), member.scaling[0]);
    same.scaling = scaling;
    return kAtenKernels.expand_grad(same, needs_dB, du);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand_grad, one_scaling_back)),
              HasSubstr("ds of expand_grad with two scalings is off"));
  const ExpandGrad without_gs = [](const MemberGrads& member, bool needs_dB, const Tensor* du) {
    MemberGrads same = member;
    same.gs = nullptr;
    return kAtenKernels.expand_grad(same, needs_dB, du);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand_grad, without_gs)),
              HasSubstr("ds of expand_grad is off"));
  const ExpandGrad without_gtap = [](const MemberGrads& member, bool needs_dB, const Tensor* du) {
    MemberGrads same = member;
    if (!member.keep_tap) same.gtap = nullptr;
    return kAtenKernels.expand_grad(same, needs_dB, du);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand_grad, without_gtap)),
              HasSubstr("du of expand_grad is off"));
  const ExpandGrad without_kept = [](const MemberGrads& member, bool needs_dB, const Tensor* du) {
    MemberGrads same = member;
    if (member.keep_tap) same.gtap = nullptr;
    return kAtenKernels.expand_grad(same, needs_dB, du);
  };
  EXPECT_THAT(on_cpu(with(&DeviceKernels::expand_grad, without_kept)),
              HasSubstr("du of expand_grad with a kept tap is off"));
}

TEST(KernelChoice, SaysForPeopleWhatIsUsedAndWhy) {
  using ::testing::HasSubstr;
  const Tensor x = torch::zeros({2, 3}, at::kBFloat16);
  const DeviceKernels right = kAtenKernels;
  const DeviceKernels wrong = with(&DeviceKernels::project_grad, negated_project_grad);
  Warnings warnings;
  KernelChoice agreeing(right, KernelPolicy::kAuto), failing(wrong, KernelPolicy::kAuto);
  EXPECT_FALSE(failing.knows(x));
  for (int i = 0; i < 2; ++i) {  // the second time no warning is given
    EXPECT_THAT(agreeing.describe(x), HasSubstr("they agree with ATen"));
    EXPECT_THAT(failing.describe(x),
                HasSubstr("ATen's form (RESLORA_KERNELS=auto: the fused kernels failed their check "
                          "at rank 9 project_grad is off by"));
  }
  EXPECT_TRUE(failing.knows(x));
  EXPECT_THAT(KernelChoice(wrong, KernelPolicy::kFused).describe(x), HasSubstr("not checked"));
  EXPECT_EQ(KernelChoice(right, KernelPolicy::kAten).describe(x),
            "ATen's form (RESLORA_KERNELS=aten)");
}

TEST(KernelChoice, LeavesTheRandomNumbersOfTheUserAlone) {
  torch::manual_seed(3);
  const Tensor want = torch::randn({4});
  torch::manual_seed(3);
  disagreement(kAtenKernels, at::kCPU, at::kBFloat16);
  EXPECT_TRUE(torch::equal(torch::randn({4}), want));
}

TEST(KernelChoice, FallsBackWithOneWarning) {
  const DeviceKernels wrong = with(&DeviceKernels::project_grad, negated_project_grad);
  KernelChoice choice(wrong, KernelPolicy::kAuto);
  Warnings warnings;
  const Tensor x = torch::zeros({2, 3}, at::kBFloat16);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(&choice.of(x, true), &kAtenKernels);
  ASSERT_EQ(warnings.all.size(), 1u);
  EXPECT_THAT(warnings.all[0], ::testing::AllOf(::testing::HasSubstr("project_grad is off by"),
                                                ::testing::HasSubstr("on cpu in BFloat16"),
                                                ::testing::HasSubstr("RESLORA_KERNELS")));
  EXPECT_EQ(&choice.of(x.to(at::kHalf), true), &kAtenKernels);  // another type: another check
  EXPECT_EQ(warnings.all.size(), 2u);
}

TEST(KernelChoice, TakesRightKernelsAfterACheck) {
  const DeviceKernels right = kAtenKernels;
  KernelChoice choice(right, KernelPolicy::kAuto);
  Warnings warnings;
  const Tensor x = torch::zeros({2, 3}, at::kBFloat16);
  EXPECT_EQ(&choice.of(x, false), &kAtenKernels);  // under capture nothing may be compared
  EXPECT_THAT(warnings.all, ::testing::ElementsAre(::testing::HasSubstr("run one forward before")));
  warnings.all.clear();
  EXPECT_EQ(&choice.of(x, true), &right);
  EXPECT_EQ(&choice.of(x, false), &right);
  EXPECT_EQ(warnings.all.size(), 0u);
}

TEST(KernelChoice, DoesAsItIsTold) {
  const DeviceKernels wrong = with(&DeviceKernels::project, throwing_project);
  Warnings warnings;
  const Tensor x = torch::zeros({2, 3}, at::kBFloat16);
  EXPECT_EQ(&KernelChoice(wrong, KernelPolicy::kFused).of(x, true), &wrong);
  EXPECT_EQ(&KernelChoice(wrong, KernelPolicy::kAten).of(x, true), &kAtenKernels);
  EXPECT_EQ(warnings.all.size(), 0u);
}

TEST(KernelChoice, ReadsItsNames) {
  EXPECT_EQ(kernel_policy_from(nullptr), KernelPolicy::kAuto);
  EXPECT_EQ(kernel_policy_from("auto"), KernelPolicy::kAuto);
  EXPECT_EQ(kernel_policy_from("fused"), KernelPolicy::kFused);
  EXPECT_EQ(kernel_policy_from("aten"), KernelPolicy::kAten);
  EXPECT_THROW(kernel_policy_from("fast"), c10::ValueError);
}

}  // namespace
}  // namespace reslora::ops
