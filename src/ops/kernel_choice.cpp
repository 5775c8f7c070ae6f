// Tries a device's own kernels against ATen's, and remembers which to use; see kernel_choice.h.
#include "ops/kernel_choice.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <string_view>
#include <utility>
#include <vector>

#include "core/check.h"

namespace reslora::ops {
namespace {

constexpr double kDropout = 0.25;

/// Sizes of a check: tails in every kernel, aligned rows and others, one block of a kernel and
/// several whose sums are added up, every width of tensor-core tiles, and more rows than one launch
/// or any kernel takes.
struct Sizes {
  int64_t rank, tokens, in, out;
};
constexpr Sizes kChecked[] = {{9, 70, 136, 200},  {24, 300, 1101, 1030}, {32, 300, 1104, 520},
                              {40, 70, 136, 200}, {100, 70, 136, 200},   {140, 70, 136, 72},
                              {260, 33, 40, 72}};

/// Inputs of one check: on the device in the type, or the same numbers as fp64.
struct Samples {
  Samples(const Sizes& sizes, at::Device device, at::ScalarType type) {
    const auto [rank, tokens, in, out] = sizes;
    const auto seed = static_cast<uint64_t>(rank);
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    const auto normal = [&](at::IntArrayRef shape) {
      return at::randn(shape, generator, at::TensorOptions(at::kFloat))
          .to(at::TensorOptions().device(device).dtype(type));
    };
    x = normal({tokens, in});
    gy = normal({tokens, out});
    s = normal({tokens, rank});
    gs = normal({tokens, rank});
    // Two blocks, the second of four rows or columns; a third of A makes a tap.
    A = {normal({rank - 4, in}), normal({4, in})};
    B = {normal({out, rank - 4}), normal({out, 4})};
    gtap = normal({tokens, 4});
    bits = at::randint(0, 256, {tokens, (in + 7) / 8}, generator, at::TensorOptions(at::kByte))
               .to(device);
  }

  Samples in_double() const {
    Samples same = *this;
    for (Tensor* t : {&same.x, &same.gy, &same.s, &same.gs, &same.gtap}) *t = t->to(at::kDouble);
    for (auto* list : {&same.A, &same.B})
      for (Tensor& t : *list) t = t.to(at::kDouble);
    return same;
  }

  Tensor x, gy, s, gs, gtap, bits;
  std::vector<Tensor> A, B;
};

/// The results of one kernel, each with its name.
using Results = std::vector<std::pair<std::string, Tensor>>;

void run_project(const DeviceKernels& kernels, const Samples& samples, Results& results) {
  const std::array<Range, 2> own = {{{0, samples.A[0].size(0)}, {samples.A[0].size(0), 4}}};
  for (const bool is_masked : {true, false}) {
    Mask mask{is_masked, is_masked ? 1 - kDropout : 1, samples.bits};
    const std::string how = is_masked ? "" : " without dropout";
    Tensor norms;
    results.emplace_back("project" + how + ", with norms",
                         kernels.project(samples.x, mask, samples.A, own, &norms));
    results.emplace_back("the norms of project" + how, norms);
    results.emplace_back("project" + how,
                         kernels.project(samples.x, mask, samples.A, own, nullptr));
    results.emplace_back("project_back" + how, kernels.project_back(samples.s, samples.A, mask));
    for (const Tensor& dA : kernels.project_grad(samples.s, samples.x, mask, samples.A))
      results.emplace_back("project_grad" + how, dA);
  }
}

/// Two layers that read one x: one with a tap of its own rows and three taps that it reads, one
/// that hands on what it has kept.
void run_taps(const DeviceKernels& kernels, const Samples& samples, Results& results) {
  const int64_t rank = samples.s.size(1);
  const std::vector<Tensor> read = {samples.gtap, samples.gtap.mul(0.5), samples.gtap};
  Member first, second;
  first.taps = read;
  second.keep_tap = true;
  const std::array<Member, 2> members = {first, second};
  // Columns: four of the first, the rest but four are its tap, and four of the second.
  const std::array<Range, 2> own = {{{0, 4}, {rank - 4, 4}}};
  const TapsTaken taken = kernels.take_taps(samples.s, members, own);
  for (const auto& [s, tap] : taken) {
    results.emplace_back("s of take_taps", s);
    results.emplace_back("the tap of take_taps", tap);
  }
  results.emplace_back("s of take_taps, alone",
                       kernels.take_taps(samples.gtap, first, Range{0, 4})[0].first);
}

void run_expand(const DeviceKernels& kernels, const Samples& samples, Results& results) {
  MemberGrads member;
  member.gy = &samples.gy;
  member.gs = &samples.gs;
  member.gtap = &samples.gtap;
  member.B = samples.B;
  member.s = &samples.s;
  const std::array<double, 2> equal = {0.75, 0.75}, other = {0.75, -1.5};
  for (const bool is_equal : {true, false}) {
    member.scaling = is_equal ? equal : other;  // arrays that live as long as the member
    const std::string how = is_equal ? "" : " with two scalings";
    results.emplace_back("expand" + how,
                         kernels.expand(samples.s, samples.B, member.scaling, &samples.gy));
    Tensor du = at::empty({samples.s.size(0), samples.s.size(1) + 4}, samples.s.options());
    const auto [ds, dB] = kernels.expand_grad(member, true, &du);
    results.emplace_back("ds of expand_grad" + how, ds);
    results.emplace_back("du of expand_grad" + how, du);
    for (const Tensor& one : dB) results.emplace_back("dB of expand_grad" + how, one);
  }
  member.keep_tap = true;
  member.gtap = &samples.gs;
  member.gs = nullptr;
  Tensor du = at::empty_like(samples.s);
  results.emplace_back("ds of expand_grad alone", kernels.expand_grad(member, false, &du).first);
  results.emplace_back("du of expand_grad with a kept tap", du);
}

/// Every function of the kernels, on given bits, by every path that the op takes.
Results run_all(const DeviceKernels& kernels, const Samples& samples) {
  Results results;
  run_project(kernels, samples, results);
  run_taps(kernels, samples, results);
  run_expand(kernels, samples, results);
  return results;
}

double largest(const Tensor& t) { return t.abs().max().item<double>(); }

/// Compares results with those of ATen; both are judged by their distance to fp64.
std::string compare(const Results& got, const Results& aten, const Results& exact,
                    at::ScalarType type) {
  const double rounding = type == at::kBFloat16 ? 0x1p-7
                          : type == at::kHalf   ? 0x1p-10
                          : type == at::kDouble ? 1e-12
                                                : 1e-5;
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
std::string check_drawing(const DeviceKernels& kernels, Samples samples) {
  SameRandomNumbers restored(samples.x.device());
  const Range own{0, samples.A[0].size(0)};
  Mask mask{true, 1 - kDropout, Tensor()};
  const Tensor got = kernels.project(samples.x, mask, samples.A, own, nullptr);
  const auto with_aten = [&](const Samples& same) -> Results {
    return {{"", kAtenKernels.project(same.x, mask, same.A, own, nullptr)}};
  };
  std::string difference = compare({{"project with bits of its own", got}}, with_aten(samples),
                                   with_aten(samples.in_double()), samples.x.scalar_type());
  if (!difference.empty()) return difference;
  const auto options = samples.x.options();
  const Tensor ones = at::ones({1, samples.x.size(1)}, options);
  const Mask drawn{true, 1.0, mask.bits};
  const double kept =
      kAtenKernels.project_back(at::ones({samples.x.size(0), 1}, options), {ones}, drawn)
          .to(at::kDouble)
          .mean()
          .item<double>();
  // Five standard deviations of that many coins.
  const double allowed = 5 * std::sqrt(kDropout * (1 - kDropout) / samples.x.numel());
  if (std::fabs(kept - (1 - kDropout)) > allowed)
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
      difference = compare(run_all(kernels, samples), run_all(kAtenKernels, samples),
                           run_all(kAtenKernels, samples.in_double()), type);
      if (difference.empty()) difference = check_drawing(kernels, samples);
    } catch (const std::exception& error) {
      const std::string_view what = error.what();
      difference = fmt::format("the check ended with: {}", what.substr(0, what.find('\n')));
    }
    if (!difference.empty()) return fmt::format("at rank {} {}", sizes.rank, difference);
  }
  return {};
}

bool KernelChoice::knows(const at::Tensor& x) {
  std::lock_guard<std::mutex> lock(mutex_);
  return policy_ != KernelPolicy::kAuto ||
         differences_.count({x.device().index(), x.scalar_type()}) > 0;
}

const DeviceKernels& KernelChoice::of(const at::Tensor& x, bool can_check) {
  if (policy_ == KernelPolicy::kAten) return kAtenKernels;
  if (policy_ == KernelPolicy::kFused) return kernels_;
  const std::pair key{x.device().index(), x.scalar_type()};
  std::lock_guard<std::mutex> lock(mutex_);
  auto known = differences_.find(key);
  if (known == differences_.end()) {
    if (!can_check) {
      if (!std::exchange(has_told_of_capture_, true))
        TORCH_WARN("[adapt] a CUDA graph is captured before the fused kernels were checked on ",
                   x.device(),
                   ", so ATen's form stays in the graph: run one forward before the capture.");
      return kAtenKernels;
    }
    known = differences_.emplace(key, disagreement(kernels_, x.device(), x.scalar_type())).first;
    if (!known->second.empty()) {
      TORCH_WARN("[adapt] the fused kernels failed their check on ", x.device(), " in ",
                 x.scalar_type(), ": ", known->second,
                 ". ATen is used in their place. RESLORA_KERNELS=aten says so without a check; "
                 "RESLORA_KERNELS=fused uses them all the same.");
    }
  }
  return known->second.empty() ? kernels_ : kAtenKernels;
}

std::string KernelChoice::describe(const at::Tensor& x) {
  if (policy_ == KernelPolicy::kAten) return "ATen's form (RESLORA_KERNELS=aten)";
  if (policy_ == KernelPolicy::kFused) return "reslora's own (RESLORA_KERNELS=fused: not checked)";
  if (&of(x, true) == &kernels_)
    return "reslora's own (RESLORA_KERNELS=auto: they agree with ATen on this device)";
  std::lock_guard<std::mutex> lock(mutex_);
  return fmt::format("ATen's form (RESLORA_KERNELS=auto: the fused kernels failed their check {})",
                     differences_.at({x.device().index(), x.scalar_type()}));
}

}  // namespace reslora::ops
