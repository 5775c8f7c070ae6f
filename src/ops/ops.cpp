// The public calls of ops.h: they write their arguments as an op's lists and call the dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>
#include <reslora/ops.h>

#include <cmath>

#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora {
namespace {

/// The dispatcher chooses a device by tensors that are there, and asks nothing else of them.
void check_given(const AdaptInput& in) {
  const auto check = [](const at::Tensor& tensor, const char* name) {
    RESLORA_CHECK(tensor.defined(), "[adapt] {} must be a tensor; got an undefined one", name);
    RESLORA_CHECK(!tensor.is_nested(), "[adapt] {} must be a dense tensor; got a nested one", name);
  };
  const auto check_all = [&](const std::vector<at::Tensor>& tensors, const char* name) {
    for (const at::Tensor& tensor : tensors) check(tensor, name);
  };
  check(in.x, "x");
  if (in.weight) check(*in.weight, "weight");
  if (in.bias) check(*in.bias, "bias");
  if (in.base_out) check(*in.base_out, "base_out");
  if (in.bits) check(*in.bits, "bits");
  check_all(in.A, "A");
  check_all(in.B, "B");
  check_all(in.taps, "taps");
}

/// NaN is the same as NaN, so that it is refused as what it is.
bool is_same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

/// The op's lists for some inputs.
struct Lists {
  std::vector<at::Tensor> bases, A, B, taps;
  std::vector<int64_t> layout;
  std::vector<double> scaling;

  void add(const AdaptInput& in) {
    check_given(in);
    RESLORA_CHECK(in.weight.has_value() != in.base_out.has_value(),
                  "[adapt] pass either weight or base_out; got {}", in.weight ? "both" : "neither");
    RESLORA_CHECK(in.weight || !in.bias, "[adapt] {}", "base_out must have no bias beside it");
    bases.push_back(in.weight ? *in.weight : *in.base_out);
    if (in.bias) bases.push_back(*in.bias);
    const auto count = [](const auto& list) { return static_cast<int64_t>(list.size()); };
    const int64_t kind = !in.weight ? ops::kBaseOut : in.bias ? ops::kWeightAndBias : ops::kWeight;
    const int64_t own[] = {kind, count(in.A), count(in.B), count(in.taps), in.keep_tap};
    layout.insert(layout.end(), std::begin(own), std::end(own));
    A.insert(A.end(), in.A.begin(), in.A.end());
    B.insert(B.end(), in.B.begin(), in.B.end());
    scaling.insert(scaling.end(), in.scaling.begin(), in.scaling.end());
    taps.insert(taps.end(), in.taps.begin(), in.taps.end());
  }
};

template <typename Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name) {
  check_single_copy();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

std::vector<AdaptOutput> call(at::ArrayRef<AdaptInput> inputs) {
  static const auto op = find_op<ops::AdaptSchema>("reslora::adapt");
  RESLORA_CHECK(!inputs.empty(), "[adapt] needs at least one layer; got {}", "none");
  const AdaptInput& first = inputs[0];
  Lists lists;
  for (const AdaptInput& in : inputs) {
    RESLORA_CHECK(&in == &first || (in.x.is_same(first.x) && is_same(in.dropout, first.dropout) &&
                                    in.bits.has_value() == first.bits.has_value() &&
                                    (!in.bits || in.bits->is_same(*first.bits)) &&
                                    in.want_norms == first.want_norms),
                  "[adapt] layers that are evaluated together must read one x, with one dropout, "
                  "bits and want_norms; got others at position {}",
                  &in - inputs.data());
    lists.add(in);
  }
  const std::vector<at::Tensor> out =
      op.call(first.x, lists.bases, lists.layout, lists.A, lists.B, lists.scaling, lists.taps,
              first.dropout, first.bits, first.want_norms);
  std::vector<AdaptOutput> outputs;
  const at::Tensor &bits = out[out.size() - 2], &norms = out[out.size() - 1];
  const bool is_single = inputs.size() == 1 || !first.want_norms;
  for (size_t g = 0; g < inputs.size(); ++g)
    outputs.push_back({out[3 * g], out[3 * g + 1], out[3 * g + 2], bits,
                       is_single ? norms : norms.narrow(0, 2 * static_cast<int64_t>(g), 2)});
  return outputs;
}

}  // namespace

AdaptOutput adapt(const AdaptInput& input) { return std::move(call(input)[0]); }

std::vector<AdaptOutput> adapt_together(const std::vector<AdaptInput>& inputs) {
  return call(inputs);
}

void record_norms(const at::Tensor& norms, const at::Tensor& ring, const at::Tensor& count) {
  using Schema = void(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op = find_op<Schema>("reslora::record_norms");
  RESLORA_CHECK(norms.defined() && ring.defined() && count.defined(),
                "[record_norms] {} must be a tensor; got an undefined one",
                !norms.defined()  ? "norms"
                : !ring.defined() ? "ring"
                                  : "count");
  op.call(norms, ring, count);
}

void record_products(const at::Tensor& s, at::TensorList taps, const at::Tensor& products,
                     double decay) {
  using Schema = void(const at::Tensor&, at::TensorList, const at::Tensor&, double);
  static const auto op = find_op<Schema>("reslora::record_products");
  RESLORA_CHECK(s.defined() && products.defined(),
                "[record_products] {} must be a tensor; got an undefined one",
                s.defined() ? "products" : "s");
  for (const at::Tensor& tap : taps)
    RESLORA_CHECK(tap.defined(), "[record_products] taps must be tensors; got an undefined one");
  op.call(s, taps, products, decay);
}

}  // namespace reslora
