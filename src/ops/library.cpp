// Every op of reslora, on one screen. Semantics: include/reslora/ops.h.
#include <torch/library.h>

TORCH_LIBRARY(reslora, m) {
  m.def(
      "adapt(Tensor x, Tensor[] bases, int[] layout, Tensor[] A, Tensor[] B, float[] scaling, "
      "Tensor[] taps, float dropout=0.0, Tensor? bits=None, bool want_norms=False) -> Tensor[]",
      // Draws dropout bits: without the tag, compile plus checkpointing would reuse or redraw them.
      // It changes no argument for the same reason: functionalization hides the tag of one that
      // does.
      {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  m.def("record_norms(Tensor norms, Tensor(a!) ring, Tensor(b!) count) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "adapt_backward(Tensor[] given, int[] layout, Tensor x, Tensor[] s, Tensor[] A, Tensor[] B, "
      "float[] scaling, Tensor? bits, float dropout, bool[3] needs) -> (Tensor dx, Tensor[] ds, "
      "Tensor[] dA, Tensor[] dB)",
      {at::Tag::pt2_compliant_tag});
}
