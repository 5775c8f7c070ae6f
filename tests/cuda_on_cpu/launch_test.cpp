// How the kernels are started: how their work is shared out, and the shared memory that they ask
// for.
#include "cuda/device.cuh"
#include "harness.h"

namespace kernel_tests {
namespace {

using namespace reslora::cuda;

constexpr int kH100 = 132, kA100 = 108;  // multiprocessors

class Launches : public testing::Test {
 protected:
  ~Launches() override { cuda_on_cpu::options() = {}; }
};

// ---- Grids

/// The work of one launch: `steps` for each of `tiles`.
struct Work {
  Cut cut;
  int64_t tiles, steps;
};

/// Of what all multiprocessors could do until the last ends, what is asked of them.
double busy(const Work& work, int multiprocessors) {
  const int64_t each = ceil_div(work.cut.tiles * work.cut.ranges, multiprocessors);
  return static_cast<double>(work.tiles * work.steps) /
         static_cast<double>(multiprocessors * each * work.cut.range);
}

ConstMatrix sized(int64_t rows, int64_t columns) { return {nullptr, rows, columns, columns}; }

Work project(int64_t T, int64_t n, int multiprocessors) {
  ProjectArgs args = {};
  args.x = sized(T, n);
  args.multiprocessors = multiprocessors;
  return {cut_of(args), ceil_div(T, 64), ceil_div(n, 64)};
}

Work project_grad(int64_t T, int64_t n, int multiprocessors) {
  ProjectGradArgs args = {};
  args.x = sized(T, n);
  args.multiprocessors = multiprocessors;
  return {cut_of(args), ceil_div(n, 64), ceil_div(T, 64)};
}

Work expand_grad(int64_t T, int64_t n, int multiprocessors) {
  ExpandGradArgs args = {};
  args.gy = sized(T, n);
  args.multiprocessors = multiprocessors;
  return {cut_of(args), ceil_div(n, 512), ceil_div(T, 16)};
}

struct Kernel {
  const char* name;
  Work (*work)(int64_t T, int64_t n, int multiprocessors);
};
constexpr Kernel kCut[] = {
    {"project", project}, {"project_grad", project_grad}, {"expand_grad", expand_grad}};

TEST_F(Launches, KeepNineTenthsOfTheMultiprocessorsBusyAtTwelveShapes) {
  for (int64_t T : {2048, 4096, 8192, 16384}) {
    for (int64_t n : {4096, 11008, 14336}) {
      for (int multiprocessors : {kH100, kA100}) {
        for (const Kernel& kernel : kCut) {
          const Work work = kernel.work(T, n, multiprocessors);
          EXPECT_GE(busy(work, multiprocessors), 0.9)
              << kernel.name << " at " << T << " x " << n << " on " << multiprocessors << ": "
              << work.cut.tiles << " tiles, ranges of " << work.cut.range;
        }
      }
    }
  }
}

TEST_F(Launches, KeepNineTenthsBusyWithFewRows) {
  for (const Kernel& kernel : kCut)
    EXPECT_GE(busy(kernel.work(512, 4096, kH100), kH100), 0.9) << kernel.name;
}

TEST_F(Launches, TakeEveryStepOnce) {
  for (int64_t T : {1, 16, 17, 100, 1000, 5000}) {
    for (int64_t n : {8, 64, 520, 1000, 4100}) {
      for (int multiprocessors : {1, 4, kH100}) {
        for (const Kernel& kernel : kCut) {
          const auto [cut, tiles, steps] = kernel.work(T, n, multiprocessors);
          EXPECT_EQ(cut.tiles, tiles);
          EXPECT_GE(cut.range * cut.ranges, steps);
          EXPECT_LT(cut.range * (cut.ranges - 1), steps);
          EXPECT_GE(cut.range, std::min<int64_t>(steps, 2)) << "a range leaves a part of the sum";
        }
      }
    }
  }
}

// ---- Shared memory

struct Gradients {
  std::vector<uint16_t> ds, dB;
};

/// Runs expand_grad at rank R on fixed inputs.
Gradients run_expand_grad(int64_t R, Type type) {
  constexpr int64_t T = 70, n = 520;
  std::mt19937 random{4};
  Buffer gy(T, n, type), B(n, R, type), s(T, R, type), ds(T, R, type), dB(n, R, type);
  gy.fill(random), B.fill(random), s.fill(random);
  run(ExpandGradArgs{type, gy, B, s, {}, {}, 1}, ds, dB, 1.0f);
  return {ds.content(), dB.content()};
}

/// Runs every kernel at rank R where it has that rank.
void run_all(int64_t R, Type type) {
  constexpr int64_t T = 3, n = 16;
  std::mt19937 random{4};
  Buffer x(T, n, type), A(R, n, type), u(T, R, type), dA(R, n, type);
  x.fill(random), A.fill(random), u.fill(random);
  Bits bits(T, n);
  for (Dropout dropout : {Dropout::kNone, Dropout::kDrawn, Dropout::kGiven}) {
    const Mask mask{dropout, bits.bytes.get(), 60000, {}};
    run(ProjectArgs{type, x, A, u, 1.0f, mask, nullptr, {}, 1});
  }
  for (const uint8_t* kept : {bits.bytes.get(), static_cast<uint8_t*>(nullptr)}) {
    run(ProjectGradArgs{type, u, x, {}, kept, 1}, dA, 1.0f);
    EXPECT_EQ(launch_expand({type, u, A, x, {}, 1.0f, kept}, nullptr), cudaSuccess) << R;
  }
  if (R <= kMaxExpandGradRank) run_expand_grad(R, type);
}

TEST_F(Launches, FindRoomOnDevicesWith99KiBOfSharedMemory) {
  cuda_on_cpu::options().device = 7;  // one that no other test has asked
  cuda_on_cpu::options().shared_bytes = 99 * 1024;
  for (int64_t R : {16, 32, 64, 128}) run_all(R, R < 64 ? Type::kBFloat16 : Type::kHalf);
}

TEST_F(Launches, GiveEqualBitsWhateverTheSharedMemory) {
  for (int64_t R : {9, 24}) {
    const Gradients on_h100 = run_expand_grad(R, Type::kBFloat16);
    cuda_on_cpu::options().shared_bytes = 99 * 1024;
    const Gradients on_less = run_expand_grad(R, Type::kBFloat16);
    cuda_on_cpu::options() = {};
    EXPECT_EQ(on_less.ds, on_h100.ds);
    EXPECT_EQ(on_less.dB, on_h100.dB);
  }
}

TEST_F(Launches, AskForSharedMemoryOnceForEachKernelAndDevice) {
  cuda_on_cpu::options().device = 1;
  const int before = cuda_on_cpu::times_allowed();
  run_expand_grad(16, Type::kHalf);
  EXPECT_EQ(cuda_on_cpu::times_allowed(), before + 1);
  run_expand_grad(16, Type::kHalf);
  EXPECT_EQ(cuda_on_cpu::times_allowed(), before + 1);
  run_expand_grad(16, Type::kBFloat16);
  EXPECT_EQ(cuda_on_cpu::times_allowed(), before + 2);
  cuda_on_cpu::options().device = 2;
  run_expand_grad(16, Type::kHalf);
  EXPECT_EQ(cuda_on_cpu::times_allowed(), before + 3);
}

TEST_F(Launches, ReturnTheErrorWhereNoKernelHasRoom) {
  cuda_on_cpu::options().device = 3;
  cuda_on_cpu::options().shared_bytes = 64 * 1024;
  Buffer gy(2, 8, Type::kHalf), B(8, 4, Type::kHalf), s(2, 4, Type::kHalf);
  EXPECT_EQ(launch_expand_grad({Type::kHalf, gy, B, s, {}, {}, 1}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace kernel_tests
