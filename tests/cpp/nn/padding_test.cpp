// Calibrating on padded batches: what is left out, and what a warning tells.
#include <gtest/gtest.h>
#include <reslora/adapters.h>
#include <torch/torch.h>

#include "small_net.h"
#include "testing.h"

namespace reslora {
namespace {

using namespace reslora::testing;  // NOLINT

constexpr int64_t kTexts = 30, kTokens = 7;

/// A net in fp64 that is adapted, in eval mode.
struct Adapted {
  explicit Adapted(const std::string& res_mode)
      : net(4), adapters(inject(*net, config_of(res_mode))) {
    net->to(torch::kDouble);
    randomise(adapters);
    net->eval();
  }
  Net net;
  Adapters adapters;
};

/// Texts [texts, tokens, width] of which the last tokens are padding, far from all others.
struct Padded {
  Padded() {
    x = random({kTexts, kTokens, kWidth}, 1);
    const at::Tensor length = at::arange(kTexts).remainder(kTokens) + 1;
    mask = at::arange(kTokens).unsqueeze(0) < length.unsqueeze(1);
    x.masked_fill_(mask.logical_not().unsqueeze(-1), 50);
  }
  /// Each text without its padding.
  std::vector<at::Tensor> texts() const {
    std::vector<at::Tensor> all;
    for (int64_t i = 0; i < kTexts; ++i) all.push_back(x[i].index({mask[i]}).unsqueeze(0));
    return all;
  }
  at::Tensor x, mask;
};

std::vector<Fit> fits_of(const Adapters& adapters) {
  std::vector<Fit> fits;
  for (const ChainView& view : adapters.views())
    for (const LayerView& layer : view.layers) fits.push_back(layer.fit);
  return fits;
}

class Padding : public ::testing::TestWithParam<const char*> {};

TEST_P(Padding, IsLeftOutOfTheFits) {
  torch::manual_seed(3);
  const Adapted model(GetParam());
  const Padded padded;
  const auto silent = [&](const at::Tensor& batch) { model.net.ptr()->forward(batch); };
  model.adapters.calibrate(padded.texts(), silent);
  const std::vector<Fit> wanted = fits_of(model.adapters);
  const std::vector<at::Tensor> batch = {padded.x};
  const auto mask_of = [&](const at::Tensor&) { return padded.mask; };
  model.adapters.calibrate(batch, silent, mask_of);
  const std::vector<Fit> masked = fits_of(model.adapters);
  model.adapters.calibrate(batch, silent);
  const std::vector<Fit> unmasked = fits_of(model.adapters);
  int64_t fitted = 0;
  for (size_t n = 0; n < wanted.size(); ++n) {
    ASSERT_EQ(masked[n].A.defined(), wanted[n].A.defined());
    if (!wanted[n].A.defined()) continue;
    ++fitted;
    EXPECT_EQ(masked[n].rows, padded.mask.sum().item<int64_t>());
    EXPECT_EQ(wanted[n].rows, masked[n].rows);
    EXPECT_TRUE(all_close(masked[n].A, wanted[n].A, 1e-9));
    EXPECT_EQ(unmasked[n].rows, kTexts * kTokens);
    EXPECT_FALSE(all_close(unmasked[n].A, wanted[n].A, 1e-3));
  }
  EXPECT_EQ(fitted, 6);
}

TEST_P(Padding, IsLeftOutOfTheOutputThatIsCompared) {
  torch::manual_seed(5);
  const Adapted model(GetParam());
  const Padded padded;
  const auto mask_of = [&](const at::Tensor&) { return padded.mask; };
  const std::vector<at::Tensor> batch = {padded.x};
  model.adapters.calibrate(
      batch, [&](const at::Tensor& x) { return model.net.ptr()->forward(x); }, mask_of);
  const std::vector<Fit> wanted = fits_of(model.adapters);
  // Noise in the rows of padding would drown every difference.
  const auto noisy = [&](const at::Tensor& x) {
    const at::Tensor noise = 1e3 * torch::randn({kTexts, kTokens, 1}, torch::kDouble);
    return model.net.ptr()->forward(x) + noise.masked_fill(padded.mask.unsqueeze(-1), 0);
  };
  model.adapters.calibrate(batch, noisy, mask_of);
  const std::vector<Fit> found = fits_of(model.adapters);
  bool has_moved = false;
  for (size_t n = 0; n < wanted.size(); ++n) {
    ASSERT_EQ(found[n].A.defined(), wanted[n].A.defined());
    if (!wanted[n].A.defined()) continue;
    EXPECT_TRUE(all_close(found[n].A, wanted[n].A, 1e-12));
    has_moved |= wanted[n].B.defined();
  }
  EXPECT_TRUE(has_moved);
}

INSTANTIATE_TEST_SUITE_P(Linked, Padding, ::testing::Values("is", "ms"));

TEST(Padding, IsMaskedInEveryFormThatMasksHave) {
  torch::manual_seed(3);
  const Adapted model("is");
  const Padded padded;
  const std::vector<at::Tensor> batch = {padded.x};
  const auto silent = [&](const at::Tensor& x) { model.net.ptr()->forward(x); };
  const auto rows_by = [&](const auto& mask_of) {
    model.adapters.calibrate(batch, silent, mask_of);
    return fits_of(model.adapters)[1].rows;
  };
  const int64_t kept = padded.mask.sum().item<int64_t>(), all = kTexts * kTokens;
  EXPECT_EQ(rows_by([&](const at::Tensor&) { return padded.mask.to(at::kLong); }), kept);
  const std::vector<at::Tensor> two = {at::zeros({2, 2}, at::kBool), padded.mask};
  EXPECT_EQ(rows_by([&](const at::Tensor&) { return two; }), kept);
  EXPECT_EQ(rows_by([](const at::Tensor&) { return at::Tensor(); }), all);
  EXPECT_EQ(rows_by([](const at::Tensor& x) { return x.select(2, 0) != 50; }), kept);
  const std::vector<Fit> before = fits_of(model.adapters);
  EXPECT_TRUE(refuses([&] { rows_by([&](const at::Tensor&) { return padded.mask * -1e9; }); },
                      "a mask [batch, tokens] must hold 1 for tokens and 0 for padding"));
  EXPECT_TRUE(at::equal(fits_of(model.adapters)[1].A, before[1].A));
}

/// Layers that see the tokens as they are, then layers that see one token more.
struct WindowsImpl : torch::nn::Module {
  WindowsImpl() {
    for (int n = 0; n < 3; ++n) near->push_back(ResLoraLinear(kWidth, kWidth));
    for (int n = 0; n < 3; ++n) far->push_back(ResLoraLinear(kWidth, kWidth));
    register_module("near", near);
    register_module("far", far);
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& layer : *near) x = torch::tanh(layer->as<ResLoraLinear>()->forward(x));
    x = torch::cat({x, x.narrow(1, 0, 1)}, 1);
    for (const auto& layer : *far) x = torch::tanh(layer->as<ResLoraLinear>()->forward(x));
    return x;
  }
  torch::nn::ModuleList near, far;
};
TORCH_MODULE(Windows);

TEST(Padding, OfLayersWithOtherRowsIsFittedWithAWarning) {
  Windows model;
  const Adapters adapters =
      inject(*model, ResLoraConfig().r(2).res_mode("is").target_modules("all-linear"));
  randomise(adapters);
  model->eval();
  const Padded padded;
  const auto run = [&](const at::Tensor& x) { model->forward(x.to(at::kFloat)); };
  Warnings warnings;
  adapters.calibrate(std::vector{padded.x}, run, [&](const at::Tensor&) { return padded.mask; });
  EXPECT_EQ(warnings.all, std::vector<std::string>{
                              "[calibrate] the rows of 2 layers have another shape than the "
                              "attention mask, so their padding was fitted too (far.1, ...)"});
  const std::vector<Fit> fits = fits_of(adapters);
  EXPECT_EQ(fits[1].rows, padded.mask.sum().item<int64_t>());
  EXPECT_EQ(fits[4].rows, kTexts * (kTokens + 1));
}

TEST(Calibrate, WarnsOfFewRowsAndRefusesWhatIsSwitchedOff) {
  const Adapted model("is");
  const std::vector<at::Tensor> batch = {random({5, kWidth}, 1)};
  const auto run = [&](const at::Tensor& x) { model.net.ptr()->forward(x); };
  Warnings warnings;
  model.adapters.calibrate(batch, run);
  ASSERT_EQ(warnings.all.size(), 1U);
  EXPECT_NE(warnings.all[0].find("6 layers saw fewer rows than they have features (5 of 8 in "),
            std::string::npos);
  model.adapters.set_enabled(false);
  EXPECT_TRUE(refuses([&] { model.adapters.calibrate(batch, run); },
                      "adapters must be enabled; got layers.0.q_proj disabled"));
}

TEST(Calibrate, MovesNothingWhereOutputsCannotBeCompared) {
  torch::manual_seed(5);
  const Adapted model("ms");
  const std::vector<at::Tensor> batch = {random({300, kWidth}, 1)};
  int64_t calls = 0;
  const auto ranks = [&](const auto& call) {
    model.adapters.calibrate(batch, call);
    int64_t most = 0;
    for (const Fit& fit : fits_of(model.adapters))
      if (fit.A.defined()) most = std::max(most, fit.A.size(0));
    return most;
  };
  const auto forward = [&](const at::Tensor& x) { return model.net.ptr()->forward(x); };
  EXPECT_EQ(ranks(forward), 4);
  EXPECT_EQ(ranks([&](const at::Tensor& x) { return forward(x) * INFINITY; }), 2);
  EXPECT_EQ(ranks([&](const at::Tensor& x) { return forward(x).to(at::kLong); }), 2);
  EXPECT_EQ(ranks([&](const at::Tensor& x) { return forward(x).sum(); }), 2);
  EXPECT_EQ(ranks([&](const at::Tensor& x) { return forward(x).narrow(0, 0, ++calls); }), 2);
}

}  // namespace
}  // namespace reslora
