// Element types and entries of tensors; see tensor_types.h.
#include "io/tensor_types.h"

#include <algorithm>
#include <array>

namespace reslora::detail {
namespace {

constexpr std::array<std::pair<Dtype, at::ScalarType>, 12> kTypes{{
    {Dtype::kF64, at::kDouble},
    {Dtype::kI64, at::kLong},
    {Dtype::kF32, at::kFloat},
    {Dtype::kI32, at::kInt},
    {Dtype::kF16, at::kHalf},
    {Dtype::kBF16, at::kBFloat16},
    {Dtype::kI16, at::kShort},
    {Dtype::kF8E4M3, at::kFloat8_e4m3fn},
    {Dtype::kF8E5M2, at::kFloat8_e5m2},
    {Dtype::kI8, at::kChar},
    {Dtype::kU8, at::kByte},
    {Dtype::kBool, at::kBool},
}};

}  // namespace

at::ScalarType scalar_type(Dtype dtype) {
  const auto* row = std::find_if(kTypes.begin(), kTypes.end(),
                                 [&](const auto& pair) { return pair.first == dtype; });
  return row->second;
}

at::Tensor file_order(const at::Tensor& tensor) {
  return tensor.detach().resolve_conj().resolve_neg().to(at::kCPU).contiguous();
}

TensorEntry entry_of(const std::string& name, const at::Tensor& tensor) {
  require(tensor.defined(), "tensor {} must be defined", shown(name));
  require(tensor.layout() == at::kStrided && !tensor.is_meta() && !tensor.is_nested() &&
              !tensor.is_quantized(),
          "tensor {} must be a plain dense tensor with data; got layout {} on {}", shown(name),
          c10::str(tensor.layout()), tensor.device().str());
  require(tensor.numel() > 0,
          "tensor {} must not be empty; got {}, which is mostly a weight that "
          "a sharded trainer holds elsewhere: gather it first",
          shown(name), c10::str(tensor.sizes()));
  const auto* row = std::find_if(kTypes.begin(), kTypes.end(), [&](const auto& pair) {
    return pair.second == tensor.scalar_type();
  });
  require(row != kTypes.end(),
          "tensor {} has dtype {}, which these files do not hold: cast it first", shown(name),
          c10::toString(tensor.scalar_type()));
  TensorEntry entry;
  entry.name = name;
  entry.dtype = row->first;
  entry.shape = tensor.sizes().vec();
  return entry;
}

}  // namespace reslora::detail
