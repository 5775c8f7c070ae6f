// Every op of reslora, on one screen. Semantics: include/reslora/ops.h.
#include <torch/library.h>

TORCH_LIBRARY(reslora, m) {
  m.def(
      "adapt(Tensor x, Tensor? weight, Tensor? bias, Tensor? base_out, Tensor[] A, Tensor[] B, "
      "float[] scaling, Tensor[] taps, float dropout=0.0, Tensor? bits=None, bool keep_tap=False, "
      "bool want_norms=False) -> (Tensor y, Tensor s, Tensor tap, Tensor bits, Tensor norms)",
      // Draws dropout bits: without the tag, compile plus checkpointing would reuse or redraw them.
      // It changes no argument for the same reason: functionalization hides the tag of one that
      // does.
      {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  m.def("record_norms(Tensor norms, Tensor(a!) ring, Tensor(b!) count) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "adapt_backward(Tensor? gy, Tensor? gs, Tensor? gtap, Tensor x, Tensor? weight, Tensor[] A, "
      "Tensor[] B, float[] scaling, Tensor s, Tensor? bits, float dropout, bool keep_tap, "
      "bool[3] needs) -> (Tensor dx, Tensor ds, Tensor[] dA, Tensor[] dB)",
      {at::Tag::pt2_compliant_tag});
}
