// Tries a device's own kernels against ATen's, and remembers which to use; see kernel_choice.h.
#include "ops/kernel_choice.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#include "core/check.h"

namespace reslora::ops {
namespace {

constexpr double kDropout = 0.25;

/// Sizes of a check: tails in every kernel, aligned rows and others, one block of a kernel and
/// several whose sums are added up, every width of tensor-core tiles.
struct Sizes {
  int64_t rank, tokens, in, out;
};
constexpr Sizes kChecked[] = {{9, 70, 136, 200},
                              {24, 300, 1101, 1030},
                              {32, 300, 1104, 520},
                              {40, 70, 136, 200},
                              {100, 70, 136, 200}};

/// Inputs of one check, in fp64 on the CPU, and in the type on the device.
struct Samples {
  Samples(const Sizes& sizes, at::Device device, at::ScalarType type)
      : generator(at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(sizes.rank))),
        options(at::TensorOptions().device(device).dtype(type)) {
    const auto [rank, tokens, in, out] = sizes;
    x = normal({tokens, in});
    gy = normal({tokens, out});
    s = normal({tokens, rank});
    // Two blocks, the second of four rows or columns.
    A = {normal({rank - 4, in}), normal({4, in})};
    B = {normal({out, rank - 4}), normal({out, 4})};
    bits = at::randint(0, 256, {tokens, (in + 7) / 8}, generator, at::TensorOptions(at::kByte))
               .to(device);
  }

  Tensor normal(at::IntArrayRef sizes) {
    return at::randn(sizes, generator, at::TensorOptions(at::kFloat)).to(options);
  }

  at::Generator generator;
  at::TensorOptions options;
  Tensor x, gy, s, bits;
  std::vector<Tensor> A, B;
};

Tensor in_double(const Tensor& t) { return t.to(at::kDouble); }

std::vector<Tensor> in_double(const std::vector<Tensor>& all) {
  std::vector<Tensor> out;
  out.reserve(all.size());
  for (const Tensor& t : all) out.push_back(in_double(t));
  return out;
}

/// The results of one kernel, each with its name.
using Results = std::vector<std::pair<std::string, Tensor>>;

Results run_project(const DeviceKernels& kernels, const Tensor& x, at::TensorList A,
                    const Tensor& bits) {
  Mask mask{true, 1 - kDropout, bits};
  Tensor norms;
  const Range own{0, A[0].size(0)};  // of the first block
  const Tensor u = kernels.project(x, mask, A, own, &norms);
  return {{"project", u}, {"the norms of project", norms}};
}

/// Every kernel on given bits. What is not in `type` yet is made so: the samples for fp64.
Results run_all(const DeviceKernels& kernels, const Samples& samples, bool is_exact) {
  const auto as = [&](const Tensor& t) { return is_exact ? in_double(t) : t; };
  const Tensor x = as(samples.x), gy = as(samples.gy), s = as(samples.s);
  const std::vector<Tensor> A = is_exact ? in_double(samples.A) : samples.A;
  const std::vector<Tensor> B = is_exact ? in_double(samples.B) : samples.B;
  const std::vector<double> scaling = {0.75, 0.75};
  const Mask mask{true, 1 - kDropout, samples.bits};

  Results results = run_project(kernels, x, A, samples.bits);
  results.emplace_back("expand", kernels.expand(s, B, scaling, &gy));
  results.emplace_back("project_back", kernels.project_back(s, A, mask));
  for (const Tensor& dA : kernels.project_grad(s, x, mask, A))
    results.emplace_back("project_grad", dA);
  const auto [ds, dB] = kernels.expand_grad(gy, B, scaling, &s);
  results.emplace_back("ds of expand_grad", ds);
  for (const Tensor& one : dB) results.emplace_back("dB of expand_grad", one);
  return results;
}

double largest(const Tensor& t) { return t.abs().max().item<double>(); }

/// Compares results with those of ATen; both are judged by their distance to fp64.
std::string compare(const Results& got, const Results& aten, const Results& exact,
                    at::ScalarType type) {
  const double rounding = type == at::kBFloat16 ? 0x1p-7 : type == at::kHalf ? 0x1p-10 : 1e-5;
  for (size_t k = 0; k < got.size(); ++k) {
    const Tensor want = exact[k].second.to(at::kDouble);
    const double error = std::fabs(largest(got[k].second.to(at::kDouble) - want));  // no -NaN
    const double allowed =
        4 * largest(aten[k].second.to(at::kDouble) - want) + rounding * largest(want);
    if (!(error <= allowed))
      return fmt::format("{} is off by {:.3g} where at most {:.3g} was expected", got[k].first,
                         error, allowed);
  }
  return {};
}

/// Keeps the default generator of a device as it was.
class SameRandomNumbers {
 public:
  explicit SameRandomNumbers(at::Device device)
      : generator_(at::globalContext().defaultGenerator(device)) {
    std::lock_guard<std::mutex> lock(generator_.mutex());
    state_ = generator_.get_state();
  }
  ~SameRandomNumbers() {
    try {
      std::lock_guard<std::mutex> lock(generator_.mutex());
      generator_.set_state(state_);
    } catch (const std::exception&) {  // a device that no longer answers: the error that led here
    }                                  // is the one to tell
  }

 private:
  at::Generator generator_;
  Tensor state_;
};

/// Lets the kernels draw bits: the product must be that of the bits, and as many be kept as asked.
std::string check_drawing(const DeviceKernels& kernels, const Samples& samples) {
  SameRandomNumbers restored(samples.x.device());
  const Range own{0, samples.A[0].size(0)};
  Mask mask{true, 1 - kDropout, Tensor()};
  const Results got = {
      {"project with bits of its own", kernels.project(samples.x, mask, samples.A, own, nullptr)}};
  const Results aten = {run_project(kAtenKernels, samples.x, samples.A, mask.bits)[0]};
  const std::vector<Tensor> exact_A = in_double(samples.A);
  const Results exact = {run_project(kAtenKernels, in_double(samples.x), exact_A, mask.bits)[0]};
  std::string difference = compare(got, aten, exact, samples.x.scalar_type());
  if (!difference.empty()) return difference;
  const int64_t tokens = samples.x.size(0), in = samples.x.size(1);
  const Tensor ones = at::ones({1, in}, samples.options);
  const Mask drawn{true, 1.0, mask.bits};
  const double kept =
      kAtenKernels.project_back(at::ones({tokens, 1}, samples.options), {ones}, drawn)
          .to(at::kDouble)
          .mean()
          .item<double>();
  // 9520 coins at least: five standard deviations are 0.022.
  if (std::fabs(kept - (1 - kDropout)) > 0.025)
    return fmt::format("project keeps {:.3f} of the elements where {} was asked", kept,
                       1 - kDropout);
  return {};
}

}  // namespace

KernelPolicy kernel_policy_from(const char* name) {
  const std::string_view choice = name ? name : "auto";
  RESLORA_CHECK(choice == "auto" || choice == "fused" || choice == "aten",
                "[adapt] RESLORA_KERNELS must be auto, fused or aten; got {}", choice);
  if (choice == "auto") return KernelPolicy::kAuto;
  return choice == "fused" ? KernelPolicy::kFused : KernelPolicy::kAten;
}

KernelPolicy kernel_policy() {
  static const KernelPolicy policy = kernel_policy_from(std::getenv("RESLORA_KERNELS"));
  return policy;
}

std::string disagreement(const DeviceKernels& kernels, at::Device device, at::ScalarType type) {
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  for (const Sizes& sizes : kChecked) {
    std::string difference;
    try {
      const Samples samples(sizes, device, type);
      difference = compare(run_all(kernels, samples, false), run_all(kAtenKernels, samples, false),
                           run_all(kAtenKernels, samples, true), type);
      if (difference.empty()) difference = check_drawing(kernels, samples);
    } catch (const std::exception& error) {
      const std::string_view what = error.what();
      difference = what.substr(0, what.find('\n'));
    }
    if (!difference.empty()) return fmt::format("at rank {} {}", sizes.rank, difference);
  }
  return {};
}

const DeviceKernels& KernelChoice::of(const at::Tensor& x, bool can_check) {
  if (policy_ == KernelPolicy::kAten) return kAtenKernels;
  if (policy_ == KernelPolicy::kFused) return kernels_;
  const std::pair key{x.device().index(), x.scalar_type()};
  std::lock_guard<std::mutex> lock(mutex_);
  auto known = are_right_.find(key);
  if (known == are_right_.end()) {
    if (!can_check) return kAtenKernels;
    const std::string difference = disagreement(kernels_, x.device(), x.scalar_type());
    known = are_right_.emplace(key, difference.empty()).first;
    if (!difference.empty()) {
      TORCH_WARN("[adapt] the fused kernels do not agree with ATen on ", x.device(), " in ",
                 x.scalar_type(), ": ", difference,
                 ". ATen is used in their place. RESLORA_KERNELS=aten says so without a check; "
                 "RESLORA_KERNELS=fused uses them all the same.");
    }
  }
  return known->second ? kernels_ : kAtenKernels;
}

}  // namespace reslora::ops
