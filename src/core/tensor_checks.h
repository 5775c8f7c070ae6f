// What public calls ask of the tensors that they are given, in one sentence.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace reslora::detail {

/// Any size, in what `check_floating` asks for.
constexpr int64_t kAny = -1;

/// A tensor for messages: "none", or dtype and sizes, and what else is unusual: "Float [3, 4] on
/// meta".
std::string described(const at::Tensor& tensor);

/// True for a dense tensor that is given, wherever it lies.
bool is_dense(const at::Tensor& tensor);

/// Throws c10::ValueError unless `tensor` is dense, floating, in memory and of these sizes. `op`
/// and `role` begin the sentence; `layer`, where it is not empty, ends it.
void check_floating(const at::Tensor& tensor, at::IntArrayRef sizes, const char* op,
                    const char* role, const std::string& layer = "");

/// The same for rows [..., columns], with at least one dimension.
void check_rows(const at::Tensor& tensor, int64_t columns, const char* op, const char* role,
                const std::string& layer = "");

}  // namespace reslora::detail
