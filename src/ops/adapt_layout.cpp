// Which part of the op's lists belongs to which member: reading and writing `layout`.
#include <ATen/core/dispatch/Dispatcher.h>
#include <reslora/ops.h>

#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora {
namespace ops {
namespace {

/// Deals out a list from its front.
template <typename T>
class Dealer {
 public:
  explicit Dealer(at::ArrayRef<T> list) : rest_(list) {}

  at::ArrayRef<T> take(int64_t count) {
    check(count >= 0 && static_cast<size_t>(count) <= rest_.size());
    const auto taken = rest_.slice(0, count);
    rest_ = rest_.slice(count);
    return taken;
  }

  const T* take_if(bool is_given) { return is_given ? take(1).data() : nullptr; }

  void finish() const { check(rest_.empty()); }

 private:
  static void check(bool fits) {
    RESLORA_CHECK(fits, "[adapt] layout must share out every list; got one that is too {}",
                  "short or too long for it");
  }

  at::ArrayRef<T> rest_;
};

void check_layout(at::IntArrayRef layout, size_t width) {
  RESLORA_CHECK(!layout.empty() && layout.size() % width == 0,
                "[adapt] layout must have {} integers for each member; got {}", width,
                layout.size());
}

}  // namespace

AdaptArgs sorted_args(const Tensor& x, at::TensorList bases, at::IntArrayRef layout,
                      at::TensorList A, at::TensorList B, at::ArrayRef<double> scaling,
                      at::TensorList taps, double dropout, const OptTensor& bits, bool want_norms) {
  check_layout(layout, kLayout);
  RESLORA_CHECK(scaling.size() == B.size(),
                "[adapt] needs one scaling for each B; got {} B, {} scaling", B.size(),
                scaling.size());
  AdaptArgs args{x, {}, A, dropout, bits, want_norms};
  Dealer<Tensor> base(bases), a(A), b(B), tap(taps);
  Dealer<double> scale(scaling);
  for (size_t at = 0; at < layout.size(); at += kLayout) {
    const int64_t kind = layout[at];
    RESLORA_CHECK(kind == kWeight || kind == kWeightAndBias || kind == kBaseOut,
                  "[adapt] layout must name a kind of base, 0 to 2; got {}", kind);
    Member member;
    member.weight = base.take_if(kind != kBaseOut);
    member.bias = base.take_if(kind == kWeightAndBias);
    member.base_out = base.take_if(kind == kBaseOut);
    member.A = a.take(layout[at + 1]);
    member.B = b.take(layout[at + 2]);
    member.scaling = scale.take(layout[at + 2]);
    member.taps = tap.take(layout[at + 3]);
    member.keep_tap = layout[at + 4] != 0;
    args.members.push_back(member);
  }
  base.finish(), a.finish(), b.finish(), tap.finish(), scale.finish();
  return args;
}

BackwardArgs sorted_grads(at::TensorList given, at::IntArrayRef layout, const Tensor& x,
                          at::TensorList s, at::TensorList A, at::TensorList B,
                          at::ArrayRef<double> scaling, const OptTensor& bits, double dropout,
                          std::array<bool, 3> needs) {
  check_layout(layout, kGradLayout);
  BackwardArgs args{x, {}, A, bits, dropout, needs};
  Dealer<Tensor> gift(given), entered(s), a(A), b(B);
  Dealer<double> scale(scaling);
  for (size_t at = 0; at < layout.size(); at += kGradLayout) {
    MemberGrads member;
    member.gy = gift.take_if(layout[at] & kGy);
    member.gs = gift.take_if(layout[at] & kGs);
    member.gtap = gift.take_if(layout[at] & kGtap);
    member.weight = gift.take_if(layout[at] & kGivenWeight);
    member.A = a.take(layout[at + 1]);
    member.B = b.take(layout[at + 2]);
    member.scaling = scale.take(layout[at + 2]);
    member.s = entered.take(1).data();
    member.keep_tap = layout[at + 3] != 0;
    args.members.push_back(member);
  }
  gift.finish(), entered.finish(), a.finish(), b.finish(), scale.finish();
  return args;
}

}  // namespace ops

namespace {

/// The op's lists for some inputs.
struct Lists {
  std::vector<at::Tensor> bases, A, B, taps;
  std::vector<int64_t> layout;
  std::vector<double> scaling;

  void add(const AdaptInput& in) {
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

std::vector<AdaptOutput> call(at::ArrayRef<AdaptInput> inputs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("reslora::adapt", "")
                             .typed<ops::AdaptSchema>();
  RESLORA_CHECK(!inputs.empty(), "[adapt] needs at least one layer; got {}", "none");
  const AdaptInput& first = inputs[0];
  Lists lists;
  for (const AdaptInput& in : inputs) {
    RESLORA_CHECK(in.x.is_same(first.x) && in.dropout == first.dropout &&
                      in.bits.has_value() == first.bits.has_value() &&
                      (!in.bits || in.bits->is_same(*first.bits)) &&
                      in.want_norms == first.want_norms,
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

}  // namespace reslora
