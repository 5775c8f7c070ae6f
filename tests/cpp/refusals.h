// The table of what public calls refuse: for each argument every form that is wrong, and one
// ValueError of one sentence for each. The first argument of a row is the function as its header
// declares it; tests/python/project/test_refusals.py demands a row for each of them.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "testing.h"

namespace reslora::testing {

/// What can be wrong with a tensor.
enum class Wrong { kUndefined, kEmpty, kColumns, kDims, kDtype, kMeta, kSparse };

struct Form {
  Wrong wrong;
  const char* name;
  at::Tensor tensor;
};

/// A tensor that a function takes, in every form that is wrong.
inline std::vector<Form> wrong_forms(const at::Tensor& good) {
  std::vector<int64_t> wider = good.sizes().vec();
  ++wider.back();
  const at::Tensor plain = good.detach();
  const auto other_dtype = good.is_floating_point() ? at::kInt : at::kFloat;
  return {{Wrong::kUndefined, "undefined", at::Tensor()},
          {Wrong::kEmpty, "empty", at::empty({0}, plain.options())},
          {Wrong::kColumns, "one column more", at::zeros(wider, plain.options())},
          {Wrong::kDims, "one dimension more", plain.unsqueeze(0)},
          {Wrong::kDtype, "of another dtype", plain.to(other_dtype)},
          {Wrong::kMeta, "on meta", plain.to(at::kMeta)},
          {Wrong::kSparse, "sparse", plain.to_sparse()}};
}

inline ::testing::AssertionResult is_refused(const std::function<void()>& call) {
  try {
    return refuses(call, "[");
  } catch (const std::exception& error) {
    return ::testing::AssertionFailure() << "no ValueError: " << error.what();
  }
}

/// A tensor argument: refused in every form but those `accepted`, which must pass as `good` does.
inline void refuses_tensors(const char* function, const char* argument, const at::Tensor& good,
                            const std::function<void(const at::Tensor&)>& call,
                            const std::set<Wrong>& accepted = {}) {
  SCOPED_TRACE(std::string(function) + ", " + argument);
  EXPECT_NO_THROW(call(good));
  for (const Form& form : wrong_forms(good)) {
    SCOPED_TRACE(form.name);
    if (accepted.count(form.wrong) > 0) {
      EXPECT_NO_THROW(call(form.tensor));
    } else {
      EXPECT_TRUE(is_refused([&] { call(form.tensor); }));
    }
  }
}

/// An index below `size`: every other one is refused.
inline void refuses_positions(const char* function, const char* argument, int64_t size,
                              const std::function<void(int64_t)>& call) {
  SCOPED_TRACE(std::string(function) + ", " + argument);
  EXPECT_NO_THROW(call(0));
  EXPECT_NO_THROW(call(size - 1));
  using Limits = std::numeric_limits<int64_t>;
  for (const int64_t n : {int64_t{-1}, size, Limits::min(), Limits::max()})
    EXPECT_TRUE(is_refused([&] { call(n); })) << n;
}

/// Anything else: `part` is of the sentence.
inline void refuses_call(const char* function, const char* what, const std::function<void()>& call,
                         const std::string& part) {
  SCOPED_TRACE(std::string(function) + ", " + what);
  try {
    EXPECT_TRUE(refuses(call, part));
  } catch (const std::exception& error) {
    ADD_FAILURE() << "no ValueError: " << error.what();
  }
}

/// Functions whose arguments cannot be wrong.
inline void refuse_nothing(const std::vector<const char*>&) {}

}  // namespace reslora::testing
