// Errors for users: one sentence, "[op] rule; got value". fmt stays out of installed headers.
#pragma once

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

/// Throws c10::ValueError (ValueError in Python) with a formatted sentence unless `condition`
/// holds.
#define RESLORA_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, fmt::format(__VA_ARGS__))
