// A program that knows the op by its name alone: no symbol of reslora stands in it.
//
// Returns 0 where the op is registered.
#include <ATen/core/dispatch/Dispatcher.h>

int main() {
  return c10::Dispatcher::singleton().findSchema({"reslora::adapt", ""}).has_value() ? 0 : 1;
}
