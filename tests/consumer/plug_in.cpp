// A library that links reslora and is exported by its project, loaded by programs of any kind.
#include <ATen/ops/ones.h>
#include <reslora/ops.h>

#include <string>

/// Evaluates one layer; returns why that was refused, "" where y is what it must be.
extern "C" __attribute__((visibility("default"))) const char* refusal() {
  static std::string text;
  try {
    reslora::AdaptInput in;
    in.x = at::ones({1, 2});
    in.weight = at::ones({3, 2});
    in.A = {at::ones({1, 2})};
    in.B = {at::ones({3, 1})};
    in.scaling = {0.5};
    text = reslora::adapt(in).y.eq(3).all().item<bool>() ? "" : "y is wrong";
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  }
  return text.c_str();
}
