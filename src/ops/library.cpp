// Every op of reslora, on one screen. Semantics: include/reslora/ops.h.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <reslora/ops.h>
#include <torch/library.h>

#include "core/check.h"
#include "ops/adapt_kernels.h"

namespace reslora {

bool ops::is_second_copy() {
  static const bool is_second =
      c10::Dispatcher::singleton().findSchema({"reslora::adapt", ""}).has_value();
  return is_second;
}

void check_single_copy() {
  if (!ops::is_second_copy()) return;
  Dl_info own = {};
  dladdr(reinterpret_cast<const void*>(&ops::is_second_copy), &own);
  RESLORA_CHECK(false,
                "[reslora] a process must load one copy of libreslora; got {} beside another that "
                "registered the ops: build all of the program with one of them (that of the Python "
                "package: python -m reslora --cmake-prefix)",
                own.dli_fname == nullptr ? "a second" : own.dli_fname);
}

}  // namespace reslora

// A fragment, since a second TORCH_LIBRARY of one name ends the process before a sentence can.
TORCH_LIBRARY_FRAGMENT(reslora, m) {
  if (reslora::ops::is_second_copy()) return;
  m.def(
      "adapt(Tensor x, Tensor[] bases, int[] layout, Tensor[] A, Tensor[] B, float[] scaling, "
      "Tensor[] taps, float dropout=0.0, Tensor? bits=None, bool want_norms=False) -> Tensor[]",
      // Draws dropout bits: without the tag, compile plus checkpointing would reuse or redraw them.
      // It changes no argument for the same reason: functionalization hides the tag of one that
      // does.
      {at::Tag::nondeterministic_seeded, at::Tag::pt2_compliant_tag});
  // Which kernels serve x and why, for people.
  m.def("kernels_of(Tensor x) -> str");
  m.def("record_norms(Tensor norms, Tensor(a!) ring, Tensor(b!) count) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def("record_products(Tensor s, Tensor[] taps, Tensor(a!) products, float decay) -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "adapt_backward(Tensor[] given, int[] layout, Tensor x, Tensor[] s, Tensor[] A, Tensor[] B, "
      "float[] scaling, Tensor? bits, float dropout, bool[3] needs) -> (Tensor dx, Tensor[] ds, "
      "Tensor[] dA, Tensor[] dB)",
      {at::Tag::pt2_compliant_tag});
}
