// Helpers shared by the C++ tests: random chains, comparisons, and a check of error sentences.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <reslora/chain.h>
#include <reslora/formulas.h>

#include <functional>
#include <string>
#include <vector>

namespace reslora::testing {

/// Normal numbers in fp64, the same for the same seed.
inline at::Tensor random(at::IntArrayRef sizes, uint64_t seed) {
  return at::randn(sizes, at::detail::createCPUGenerator(seed), at::kDouble);
}

/// What a test chain looks like; layer n has rank r and scaling 0.5 + 0.25 n.
struct ChainSpec {
  int64_t size = 5;
  int64_t in = 6;
  int64_t out = 6;
  int64_t r = 3;
  bool has_bias = true;
};

/// Blocks of a chain in fp64, all entries normal (B too, so that every shortcut has an effect).
inline std::vector<formulas::Block> random_blocks(const ChainSpec& spec, uint64_t seed = 7) {
  std::vector<formulas::Block> blocks;
  for (int64_t n = 0; n < spec.size; ++n) {
    const uint64_t base = seed * 1000 + static_cast<uint64_t>(n) * 10;
    blocks.push_back({random({spec.out, spec.in}, base),
                      spec.has_bias ? random({spec.out}, base + 1) : at::Tensor(),
                      random({spec.r, spec.in}, base + 2), random({spec.out, spec.r}, base + 3),
                      0.5 + 0.25 * static_cast<double>(n)});
  }
  return blocks;
}

/// The shapes of blocks, named layer.0, layer.1, ...
inline std::vector<LayerShape> shapes_of(const std::vector<formulas::Block>& blocks) {
  std::vector<LayerShape> shapes;
  for (const formulas::Block& block : blocks) {
    shapes.push_back({"layer." + std::to_string(shapes.size()), block.W.size(1), block.W.size(0),
                      block.A.size(0), block.scaling});
  }
  return shapes;
}

/// Same shape, and no element further apart than `tolerance` relative to the largest of `expected`.
inline ::testing::AssertionResult all_close(const at::Tensor& actual, const at::Tensor& expected,
                                            double tolerance = 1e-12) {
  if (actual.sizes() != expected.sizes()) {
    return ::testing::AssertionFailure()
           << "sizes " << actual.sizes() << " and " << expected.sizes();
  }
  if (expected.numel() == 0) return ::testing::AssertionSuccess();
  const at::Tensor a = actual.detach().to(at::kDouble);
  const at::Tensor e = expected.detach().to(at::kDouble);
  const double distance = (a - e).abs().max().item<double>();
  const double scale = e.abs().max().item<double>();
  if (distance <= tolerance * std::max(scale, 1e-30)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "distance " << distance << " at scale " << scale;
}

/// Collects warnings.
class Warnings : public c10::WarningHandler {
 public:
  Warnings() : before_(c10::WarningUtils::get_warning_handler()) {
    c10::WarningUtils::set_warning_handler(this);
  }
  ~Warnings() override { c10::WarningUtils::set_warning_handler(before_); }
  void process(const c10::Warning& warning) override { all.push_back(warning.msg()); }

  std::vector<std::string> all;

 private:
  c10::WarningHandler* before_;
};

/// True where `call` throws c10::ValueError with one sentence (no newline) that contains `part`.
inline ::testing::AssertionResult refuses(const std::function<void()>& call,
                                          const std::string& part) {
  try {
    call();
  } catch (const c10::ValueError& error) {
    const std::string message = error.what_without_backtrace();
    if (message.find('\n') != std::string::npos) {
      return ::testing::AssertionFailure() << "not one sentence: " << message;
    }
    if (message.find(part) != std::string::npos) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "another sentence: " << message;
  }
  return ::testing::AssertionFailure() << "nothing was thrown";
}

}  // namespace reslora::testing
