// The op as it runs on CUDA, with the kernels on the CPU: what a device answers is answered here.
//
// Results are compared with ATen's form; our launches are counted, and ATen's calls noted.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "emulator.h"
#include "ops/fused_kernels.h"
#include "ops/kernel_choice.h"

namespace reslora::ops {

int multiprocessors() { return 4; }
cudaStream_t current_stream() { return nullptr; }
cuda::Philox next_philox(const Tensor&) {
  static uint64_t offset = 0;
  return {7, offset += cuda::kPhiloxIncrement};
}
void check_launch(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "a launch failed with error ", static_cast<int>(error));
}

namespace {

// ---- Counting -----------------------------------------------------------------------------------

/// Launches of our kernels, and every call of ATen by name.
struct Launches {
  int64_t own = 0;
  std::vector<std::string> aten;
};

std::vector<std::string>& calls() {
  static std::vector<std::string> names;
  return names;
}

std::unique_ptr<at::ObserverContext> note_call(const at::RecordFunction& function) {
  const std::string name = function.name();
  if (name.rfind("aten::", 0) == 0) calls().push_back(name);
  return nullptr;
}

template <typename Body>
Launches launches_of(const Body& body) {
  calls().clear();
  const int64_t before = cuda_on_cpu::launches();
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback(note_call).scopes({at::RecordScope::FUNCTION}));
  body();
  at::removeCallback(handle);
  return {cuda_on_cpu::launches() - before, calls()};
}

// ---- Layers -------------------------------------------------------------------------------------

/// A layer and what its backward is given.
struct Layer {
  Layer(const std::string& mode, at::ScalarType type, at::ScalarType factor_type, int64_t r = 4,
        int64_t T = 32, int64_t in = 48, int64_t out = 40)
      : generator(at::make_generator<at::CPUGeneratorImpl>(3)) {
    const auto normal = [&](at::IntArrayRef shape, at::ScalarType wanted) {
      return at::randn(shape, generator, at::TensorOptions(at::kFloat)).mul_(0.3).to(wanted);
    };
    x = normal({T, in}, type);
    weight = normal({out, in}, type);
    const bool has_tap_rows = mode == "is";
    A = {normal({r, in}, factor_type)};
    B = {normal({out, r}, factor_type)};
    if (has_tap_rows) A.push_back(normal({r, in}, factor_type));
    if (mode != "none") taps = {normal({T, r}, type)};
    keep_tap = mode == "ms";
    gy = normal({T, out}, type);
    gtap = normal({T, r}, type);
    layout = {kWeight, static_cast<int64_t>(A.size()), 1, static_cast<int64_t>(taps.size()),
              keep_tap};
    const bool reads_tap = has_tap_rows || keep_tap;
    const int64_t has_tap = reads_tap ? int64_t{kGtap} : 0;
    grad_layout = {kGy | kGivenWeight | has_tap, layout[1], 1, keep_tap};
    given = {gy};
    if (reads_tap) given.push_back(gtap);
    given.push_back(weight);
  }

  std::vector<Tensor> forward(const DeviceKernels& kernels, double dropout, const OptTensor& bits,
                              bool want_norms) const {
    return evaluate(
        sorted_args(x, {weight}, layout, A, B, scaling, taps, dropout, bits, want_norms), kernels);
  }

  Gradients backward(const DeviceKernels& kernels, const Tensor& s, double dropout,
                     const OptTensor& bits) const {
    return evaluate_backward(
        sorted_grads(given, grad_layout, x, {s}, A, B, scaling, bits, dropout, {true, true, true}),
        kernels);
  }

  at::Generator generator;
  Tensor x, weight, gy, gtap;
  std::vector<Tensor> A, B, taps, given;
  std::vector<int64_t> layout, grad_layout;
  std::vector<double> scaling = {2.0};
  bool keep_tap = false;
};

/// Both forms round in the type of x, and sum in fp32 at least.
void expect_close(const Tensor& got, const Tensor& want, at::ScalarType type,
                  const std::string& what) {
  if (want.numel() == 0) return;
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  ASSERT_EQ(got.scalar_type(), want.scalar_type()) << what;
  const double scale = want.to(at::kDouble).abs().max().item<double>();
  const double unit = type == at::kBFloat16 ? 0x1p-6 : type == at::kFloat ? 1e-5 : 1e-12;
  const double error = (got.to(at::kDouble) - want.to(at::kDouble)).abs().max().item<double>();
  EXPECT_LE(error, unit * scale) << what;
}

void expect_same(const Layer& layer, double dropout, bool want_norms, const std::string& what) {
  const auto got = layer.forward(kFusedKernels, dropout, std::nullopt, want_norms);
  const OptTensor bits = dropout > 0 ? OptTensor(got[3]) : std::nullopt;
  const auto want = layer.forward(kAtenKernels, dropout, bits, want_norms);
  for (const size_t k : {0, 1, 2, 4})
    expect_close(got[k], want[k], layer.x.scalar_type(), what + std::to_string(k));
  const auto [dx, ds, dA, dB] = layer.backward(kFusedKernels, want[1], dropout, bits);
  const auto [dx2, ds2, dA2, dB2] = layer.backward(kAtenKernels, want[1], dropout, bits);
  expect_close(dx, dx2, layer.x.scalar_type(), what + "dx");
  expect_close(ds[0], ds2[0], layer.x.scalar_type(), what + "ds");
  for (size_t k = 0; k < dA.size(); ++k)
    expect_close(dA[k], dA2[k], layer.x.scalar_type(), what + "dA");
  for (size_t k = 0; k < dB.size(); ++k)
    expect_close(dB[k], dB2[k], layer.x.scalar_type(), what + "dB");
}

TEST(OpOnCuda, IsThatOfAten) {
  for (const auto type : {at::kBFloat16, at::kFloat, at::kDouble})
    for (const auto factors : {at::kFloat, type})
      for (const std::string mode : {"none", "is", "ms"})
        for (const double dropout : {0.0, 0.25}) {
          const std::string what =
              mode + c10::toString(type) + c10::toString(factors) + std::to_string(dropout) + ": ";
          expect_same(Layer(mode, type, factors), dropout, mode != "none", what);
        }
}

// A group of 160 rows of A takes two reads of x, one of 300 a dropped copy.
TEST(OpOnCuda, TakesAnyNumberOfRows) {
  for (const int64_t r : {40, 160, 300})
    for (const double dropout : {0.0, 0.25})
      expect_same(Layer("is", at::kBFloat16, at::kFloat, r, 24, 40, 32), dropout, true,
                  "is, r " + std::to_string(r) + ": ");
  // Two reads whose columns are cut into ranges.
  expect_same(Layer("is", at::kBFloat16, at::kBFloat16, 80, 24, 1100, 32), 0.25, true, "parts: ");
}

TEST(OpOnCuda, PassesTheCheckOfItsKernels) {
  std::vector<at::ScalarType> types = {at::kBFloat16};
  if (std::getenv("RESLORA_FULL")) types = {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble};
  for (const auto type : types) EXPECT_EQ(disagreement(kFusedKernels, at::kCPU, type), "") << type;
}

TEST(OpOnCuda, RecordsNormsInARing) {
  const Tensor ring = at::zeros({2, 3}), count = at::zeros({1}, at::kLong);
  for (int i = 0; i < 4; ++i) {
    const Tensor norms = at::tensor({10.0f + i, 20.0f + i});
    const Launches launches = launches_of([&] { record_norms_fused(norms, ring, count); });
    EXPECT_EQ(launches.own, 1);
    EXPECT_TRUE(launches.aten.empty());
  }
  EXPECT_TRUE(at::equal(ring, at::tensor({13.0f, 11.0f, 12.0f, 23.0f, 21.0f, 22.0f}).view({2, 3})));
  EXPECT_EQ(count.item<int64_t>(), 4);
}

// ---- Launches -----------------------------------------------------------------------------------

void print(const char* direction, const Launches& launches) {
  std::printf(" %s %d", direction, static_cast<int>(launches.own));
  for (const std::string& name : launches.aten) std::printf(" %s", name.c_str());
}

void print_launches_of(const Layer& layer, double dropout, bool want_norms) {
  std::vector<Tensor> out;
  print("forward", launches_of([&] {
          out = layer.forward(kFusedKernels, dropout, std::nullopt, want_norms);
        }));
  const OptTensor bits = dropout > 0 ? OptTensor(out[3]) : std::nullopt;
  print("backward", launches_of([&] { layer.backward(kFusedKernels, out[1], dropout, bits); }));
}

// tests/python/nn/test_launches.py reads what is printed: it knows which calls of ATen start a
// kernel, and compares with PEFT's LoRA.
TEST(OpOnCuda, PrintsItsLaunches) {
  for (const auto factors : {at::kBFloat16, at::kFloat})
    for (const double dropout : {0.0, 0.05})
      for (const std::string mode : {"none", "is", "ms"})
        for (const bool norms : {false, true}) {
          std::printf("launches %s %s %.2f %s", mode.c_str(), c10::toString(factors), dropout,
                      norms ? "norms" : "plain");
          print_launches_of(Layer(mode, at::kBFloat16, factors), dropout, norms);
          std::printf("\n");
        }
}

}  // namespace
}  // namespace reslora::ops
