// What does the op `adapt` alone cost, forward and with its backward, for each shortcut's row?
//
//   build/bench/benchmarks/bench_adapt --benchmark_filter=Step
//
// Arguments: tokens, features (in = out), rank. `Frozen` is the same without adapters: the floor.
// Taps are random tensors, so that one layer stands for any inner layer of a chain.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <reslora/config.h>
#include <reslora/ops.h>

#include <vector>

namespace {

using reslora::Shortcut;

constexpr int64_t kReach = 3;  // m of `bs` and `ms`

// One inner layer of a chain, as Chain::wiring describes it.
reslora::AdaptInput make_input(Shortcut shortcut, int64_t tokens, int64_t features, int64_t r) {
  at::manual_seed(0);
  const int64_t blocks = shortcut == Shortcut::kBs ? kReach + 1 : 1;
  const int64_t a_blocks = blocks + (shortcut == Shortcut::kIs ? 1 : 0);
  const int64_t taps = shortcut == Shortcut::kMs ? kReach : (shortcut == Shortcut::kIs ? 1 : 0);
  reslora::AdaptInput input;
  input.x = at::randn({tokens, features}).requires_grad_();
  input.weight = at::randn({features, features});
  input.bias = at::randn({features});
  for (int64_t k = 0; k < a_blocks; ++k) {
    input.A.push_back(at::randn({r, features}).requires_grad_());
  }
  for (int64_t k = 0; k < blocks; ++k) {
    input.B.push_back(at::randn({features, r}).requires_grad_());
    input.scaling.push_back(0.5);
  }
  for (int64_t k = 0; k < taps; ++k) {
    input.taps.push_back(at::randn({tokens, r}).requires_grad_());
  }
  input.keep_tap = shortcut == Shortcut::kMs;
  return input;
}

void clear_gradients(reslora::AdaptInput& input) {
  input.x.mutable_grad().reset();
  for (auto* tensors : {&input.A, &input.B, &input.taps}) {
    for (at::Tensor& tensor : *tensors) tensor.mutable_grad().reset();
  }
}

void forward(benchmark::State& state, Shortcut shortcut) {
  const at::NoGradGuard no_grad;
  const auto input = make_input(shortcut, state.range(0), state.range(1), state.range(2));
  for (auto _ : state) benchmark::DoNotOptimize(reslora::adapt(input).y);
}

void step(benchmark::State& state, Shortcut shortcut) {
  auto input = make_input(shortcut, state.range(0), state.range(1), state.range(2));
  const at::Tensor dy = at::randn({state.range(0), state.range(1)});
  for (auto _ : state) {
    clear_gradients(input);
    const reslora::AdaptOutput output = reslora::adapt(input);
    output.y.backward(dy);
  }
}

void frozen_step(benchmark::State& state) {
  at::manual_seed(0);
  at::Tensor x = at::randn({state.range(0), state.range(1)}).requires_grad_();
  const at::Tensor weight = at::randn({state.range(1), state.range(1)});
  const at::Tensor bias = at::randn({state.range(1)});
  const at::Tensor dy = at::randn({state.range(0), state.range(1)});
  for (auto _ : state) {
    x.mutable_grad().reset();
    at::linear(x, weight, bias).backward(dy);
  }
}

void sizes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"T", "d", "r"})->Args({2048, 768, 16})->Args({128, 384, 16});
  bench->Unit(benchmark::kMillisecond)->UseRealTime();
}

BENCHMARK(frozen_step)->Name("Step/frozen")->Apply(sizes);
BENCHMARK_CAPTURE(step, none, Shortcut::kNone)->Name("Step/none")->Apply(sizes);
BENCHMARK_CAPTURE(step, is, Shortcut::kIs)->Name("Step/is")->Apply(sizes);
BENCHMARK_CAPTURE(step, bs, Shortcut::kBs)->Name("Step/bs")->Apply(sizes);
BENCHMARK_CAPTURE(step, ms, Shortcut::kMs)->Name("Step/ms")->Apply(sizes);
BENCHMARK_CAPTURE(forward, none, Shortcut::kNone)->Name("Forward/none")->Apply(sizes);
BENCHMARK_CAPTURE(forward, is, Shortcut::kIs)->Name("Forward/is")->Apply(sizes);
BENCHMARK_CAPTURE(forward, bs, Shortcut::kBs)->Name("Forward/bs")->Apply(sizes);
BENCHMARK_CAPTURE(forward, ms, Shortcut::kMs)->Name("Forward/ms")->Apply(sizes);

}  // namespace

BENCHMARK_MAIN();
