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

std::pair<Tensor, std::vector<Tensor>> dB_with_a_wrong_column(const Tensor& gy, at::TensorList B,
                                                              at::ArrayRef<double> scaling,
                                                              const Tensor* s) {
  auto grads = kAtenKernels.expand_grad(gy, B, scaling, s);
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
            "at rank 9 no kernel image is available");
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
