// What the public calls of the op refuse.
#include "refusals.h"

#include <reslora/ops.h>

#include <limits>

namespace reslora {
namespace {

using testing::refuses_call;
using testing::refuses_tensors;
using testing::Wrong;

AdaptInput good_input() {
  AdaptInput in;
  in.x = at::randn({3, 4});
  in.weight = at::randn({5, 4});
  in.bias = at::randn({5});
  in.A = {at::randn({2, 4})};
  in.B = {at::randn({5, 2})};
  in.scaling = {1};
  in.taps = {at::randn({3, 2})};
  in.dropout = 0.5;
  in.bits = at::full({3, 1}, 255, at::kByte);
  return in;
}

/// Rows for `adapt`: `set` puts a tensor at its place.
void of_adapt(const char* argument, const at::Tensor& good,
              const std::function<void(AdaptInput&, const at::Tensor&)>& set,
              const std::set<Wrong>& accepted = {}) {
  const auto call = [&](const at::Tensor& tensor) {
    AdaptInput in = good_input();
    set(in, tensor);
    adapt(in);
  };
  refuses_tensors("adapt", argument, good, call, accepted);
  const auto together = [&](const at::Tensor& tensor) {
    AdaptInput in = good_input(), other = in;
    set(other, tensor);
    if (in.bits && !other.bits->is_same(*in.bits)) in.bits = other.bits;
    if (!other.x.is_same(in.x)) in.x = other.x;
    adapt_together({in, other});
  };
  refuses_tensors("adapt_together", argument, good, together, accepted);
}

TEST(OpRefusals, Adapt) {
  const AdaptInput good = good_input();
  AdaptInput nested = good;
  nested.x = at::_nested_tensor_from_tensor_list({at::randn({3, 4})});
  refuses_call(
      "adapt", "nested x", [&] { adapt(nested); }, "x must be a dense tensor; got a nested one");
  of_adapt("x", good.x, [](AdaptInput& in, const at::Tensor& x) { in.x = x; });
  of_adapt("weight", *good.weight, [](AdaptInput& in, const at::Tensor& W) { in.weight = W; });
  of_adapt("bias", *good.bias, [](AdaptInput& in, const at::Tensor& bias) { in.bias = bias; });
  of_adapt("A", good.A[0], [](AdaptInput& in, const at::Tensor& A) { in.A = {A}; });
  of_adapt("B", good.B[0], [](AdaptInput& in, const at::Tensor& B) { in.B = {B}; });
  of_adapt("taps", good.taps[0], [](AdaptInput& in, const at::Tensor& tap) { in.taps = {tap}; });
  of_adapt("bits", *good.bits, [](AdaptInput& in, const at::Tensor& bits) { in.bits = bits; });
  of_adapt("base_out", at::randn({3, 5}),
           [](AdaptInput& in, const at::Tensor& out) {
             in.weight = in.bias = std::nullopt;
             in.base_out = out;
           },
           {});
}

TEST(OpRefusals, NumbersAndCountsOfAdapt) {
  const auto with = [](const std::function<void(AdaptInput&)>& change) {
    return [change] {
      AdaptInput in = good_input();
      in.bits = std::nullopt;
      change(in);
      adapt(in);
    };
  };
  const auto dropout = [&](double value) { return with([=](auto& in) { in.dropout = value; }); };
  for (const double value : {-0.1, 1.0, double{NAN}})
    refuses_call("adapt", "dropout", dropout(value), "dropout must be in [0, 1)");
  refuses_call("adapt", "no base", with([](auto& in) { in.weight = {}; }), "got neither");
  refuses_call("adapt", "scaling", with([](auto& in) { in.scaling = {}; }), "0 scaling");
  refuses_call("adapt", "A", with([](auto& in) { in.A = {}; }), "0 A");
  refuses_call(
      "adapt_together", "none", [] { adapt_together({}); }, "got none");
  AdaptInput nan = good_input();
  nan.dropout = NAN;
  refuses_call(
      "adapt_together", "dropout",
      [&] {
        adapt_together({nan, nan});
      },
      "dropout must be in");
  refuses_call(
      "adapt_together", "two x",
      [] {
        adapt_together({good_input(), good_input()});
      },
      "must read one x");
}

TEST(OpRefusals, Copies) { testing::refuse_nothing({"check_single_copy"}); }

TEST(OpRefusals, RecordNorms) {
  const at::Tensor norms = at::rand({2}), ring = at::zeros({2, 3}),
                   count = at::zeros({1}, at::kLong);
  refuses_tensors("record_norms", "norms", norms,
                  [&](const at::Tensor& norms) { record_norms(norms, ring, count); },
                  {Wrong::kDims});
  refuses_tensors("record_norms", "ring", ring,
                  [&](const at::Tensor& ring) { record_norms(norms, ring, count); },
                  {Wrong::kColumns});
  refuses_tensors("record_norms", "count", count,
                  [&](const at::Tensor& count) { record_norms(norms, ring, count); },
                  {Wrong::kDims});
  for (const int64_t bad :
       {int64_t{-1}, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
    const at::Tensor other = at::full({1}, bad, at::kLong), before = ring.clone();
    refuses_call(
        "record_norms", "count", [&] { record_norms(norms, ring, other); }, "got");
    EXPECT_TRUE(at::equal(ring, before) && other.item<int64_t>() == bad) << "nothing is written";
  }
}

TEST(OpRefusals, RecordProducts) {
  const at::Tensor s = at::rand({5, 3}), tap = at::rand({5, 3}), products = at::zeros({6, 6});
  const auto record = [&](const at::Tensor& s, const at::Tensor& tap, const at::Tensor& products) {
    record_products(s, {tap}, products, 0.5);
  };
  refuses_tensors("record_products", "s", s,
                  [&](const at::Tensor& s) { record(s, tap, products); });
  refuses_tensors("record_products", "taps", tap,
                  [&](const at::Tensor& tap) { record(s, tap, products); });
  refuses_tensors("record_products", "products", products,
                  [&](const at::Tensor& products) { record(s, tap, products); });
  products.zero_();
  for (const double decay : {-0.1, 1.5, std::numeric_limits<double>::quiet_NaN()})
    refuses_call(
        "record_products", "decay", [&] { record_products(s, {tap}, products, decay); }, "0 to 1");
  EXPECT_FALSE(products.any().item<bool>()) << "nothing is written";
}

TEST(RecordNorms, TakesNormsThatAreNotSideBySide) {
  const at::Tensor ring = at::zeros({2, 3}), count = at::zeros({1}, at::kLong);
  record_norms(at::arange(6, at::kFloat).view({2, 3}).select(1, 1), ring, count);
  record_norms(at::full({1}, 7, at::kFloat).expand({2}), ring, count);
  EXPECT_TRUE(at::equal(ring, at::tensor({1, 7, 0, 4, 7, 0}, at::kFloat).view({2, 3})));
}

}  // namespace
}  // namespace reslora
