// Deals the lists of an op out to its members, as `layout` says.
#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora::ops {
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

}  // namespace reslora::ops
