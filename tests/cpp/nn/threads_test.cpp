// Several threads that run and train one adapted model: gradients and norm records.
#include <gtest/gtest.h>
#include <reslora/linear.h>
#include <reslora/ops.h>
#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "testing.h"

namespace reslora {
namespace {

constexpr int64_t kWidth = 4;
constexpr int kThreads = 4;
constexpr int kSteps = 25;

std::vector<ResLoraLinear> new_layers(int64_t count) {
  std::vector<ResLoraLinear> layers;
  for (int64_t n = 0; n < count; ++n) layers.push_back(ResLoraLinear(kWidth, kWidth));
  return layers;
}

ResLoraConfig config_of(const std::string& res_mode) {
  return ResLoraConfig().r(2).lora_alpha(3).res_mode(res_mode).norm_window(kThreads * kSteps);
}

void randomise(const LinkedChain& chain) {
  const torch::NoGradGuard no_grad;
  for (at::Tensor parameter : chain.parameters()) parameter.normal_();
}

/// Runs `body(thread)` on every thread, all beginning at once.
template <typename Body>
void at_once(const Body& body) {
  std::atomic<int> waiting{kThreads};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      body(t);
    });
  for (std::thread& thread : threads) thread.join();
}

/// The gradients of one step, and its output.
template <typename Forward>
std::vector<at::Tensor> step(const Forward& forward, const std::vector<at::Tensor>& parameters,
                             const at::Tensor& x) {
  const at::Tensor y = forward(x);
  std::vector<at::Tensor> results = torch::autograd::grad({y.square().sum()}, parameters);
  results.push_back(y.detach());
  return results;
}

/// Trains a model that has not run yet in all threads; every step must give what it gives alone.
template <typename Forward>
void check_training(const Forward& forward, const std::vector<at::Tensor>& parameters,
                    const std::vector<std::vector<at::Tensor>>& wanted,
                    const std::vector<at::Tensor>& xs) {
  std::atomic<int> wrong{0};
  at_once([&](int t) {
    for (int k = 0; k < kSteps; ++k) {
      const std::vector<at::Tensor> got = step(forward, parameters, xs[t]);
      for (size_t j = 0; j < got.size(); ++j) wrong += !torch::allclose(got[j], wanted[t][j]);
    }
  });
  EXPECT_EQ(wrong, 0);
}

/// Every thread's norm must be in the window as often as it took a step.
void check_norms(const ResLoraLinear& layer, const std::vector<double>& of_threads) {
  ASSERT_EQ(layer->norms.count().item<int64_t>(), kThreads * kSteps);
  std::vector<double> wanted;
  for (const double norm : of_threads) wanted.insert(wanted.end(), kSteps, norm);
  std::sort(wanted.begin(), wanted.end());
  const at::Tensor got = std::get<0>(layer->norms.norms()[0].to(at::kDouble).sort());
  EXPECT_TRUE(testing::all_close(got, at::tensor(wanted, at::kDouble), 1e-5));
}

at::Tensor run(const std::vector<ResLoraLinear>& layers, at::Tensor x) {
  for (ResLoraLinear layer : layers) x = torch::tanh(layer->forward(x));
  return x;
}

/// Thread t has an input of its own, so that taps and norms of one cannot pass for another's.
struct Inputs {
  Inputs() {
    for (int t = 0; t < kThreads; ++t) {
      xs.push_back(torch::randn({2 + t, kWidth}));
      norms.push_back(xs.back().norm().item<double>());
    }
  }
  std::vector<at::Tensor> xs;
  std::vector<double> norms;
};

TEST(Threads, MakeOneNormWindowInTheFirstForward) {
  const Inputs inputs;
  for (int round = 0; round < 300; ++round) {
    const std::vector<ResLoraLinear> layers = new_layers(2);
    const LinkedChain chain = link(layers, config_of("is"));
    at_once([&](int t) { run(layers, inputs.xs[t]); });
    for (const ResLoraLinear& layer : layers)
      ASSERT_EQ(layer->norms.count().item<int64_t>(), kThreads) << "round " << round;
  }
}

TEST(Threads, LoseNoNorms) {
  constexpr int64_t kCalls = 200000;
  const at::Tensor ring = at::zeros({2, kThreads * kCalls}), count = at::zeros({1}, at::kLong);
  at_once([&](int t) {
    const at::Tensor norms = at::full({2}, 1.0 + t);
    for (int64_t k = 0; k < kCalls; ++k) record_norms(norms, ring, count);
  });
  EXPECT_EQ(count.item<int64_t>(), kThreads * kCalls);
  EXPECT_TRUE(at::equal(ring.sum(1), at::full({2}, 10.0 * kCalls)));  // 1 + 2 + 3 + 4
}

class TrainingThreads : public ::testing::TestWithParam<const char*> {};

TEST_P(TrainingThreads, ShareOneModel) {
  const Inputs inputs;
  const std::vector<ResLoraLinear> layers = new_layers(3);
  const LinkedChain chain = link(layers, config_of(GetParam()));
  randomise(chain);
  const auto forward = [&](const at::Tensor& x) { return run(layers, x); };
  const std::vector<at::Tensor> parameters = chain.parameters();
  std::vector<std::vector<at::Tensor>> wanted;
  for (ResLoraLinear layer : layers) layer->eval();  // records nothing
  for (const at::Tensor& x : inputs.xs) wanted.push_back(step(forward, parameters, x));
  for (ResLoraLinear layer : layers) layer->train();
  ASSERT_FALSE(layers[0]->norms.is_defined());
  check_training(forward, parameters, wanted, inputs.xs);
  check_norms(layers[0], inputs.norms);
  EXPECT_EQ(layers[2]->norms.count().item<int64_t>(), kThreads * kSteps);
  EXPECT_EQ(chain.missed_links(2), 0);
}

TEST_P(TrainingThreads, EvaluateLayersTogether) {
  const Inputs inputs;
  const std::vector<ResLoraLinear> q = new_layers(2), k = new_layers(2);
  const LinkedChain chains[] = {link(q, config_of(GetParam())), link(k, config_of(GetParam()))};
  std::vector<at::Tensor> parameters;
  for (const LinkedChain& chain : chains) {
    randomise(chain);
    for (const at::Tensor& parameter : chain.parameters()) parameters.push_back(parameter);
  }
  const auto forward = [&](at::Tensor x) {
    for (size_t n = 0; n < q.size(); ++n) {
      const std::vector<at::Tensor> y = forward_together({q[n].ptr(), k[n].ptr()}, x);
      x = torch::tanh(y[0] - y[1]);
    }
    return x;
  };
  std::vector<std::vector<at::Tensor>> wanted;
  for (ResLoraLinear layer : {q[0], q[1], k[0], k[1]}) layer->eval();
  for (const at::Tensor& x : inputs.xs) wanted.push_back(step(forward, parameters, x));
  for (ResLoraLinear layer : {q[0], q[1], k[0], k[1]}) layer->train();
  check_training(forward, parameters, wanted, inputs.xs);
  check_norms(q[0], inputs.norms);
  check_norms(k[0], inputs.norms);
}

INSTANTIATE_TEST_SUITE_P(All, TrainingThreads, ::testing::Values("none", "is", "bs", "ms"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace reslora
