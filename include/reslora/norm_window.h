/// @file
/// What training leaves behind for the merge rules: the last N norms of a layer's input, and sums
/// of products of what enters its B.
///
/// `record_norms` and `record_products` write on the device (no host sync); merging reads once. A
/// statistic: it never changes an output or a weight. The tensors are plain, not module buffers, so
/// that casts and DistributedDataParallel's broadcasts leave them alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <reslora/export.h>

#include <cstdint>
#include <optional>

namespace reslora {

/// Which norm of a layer is meant: a row of the ring.
enum class Norm : int64_t { kInput = 0, kOwnProduct = 1 };  // |x_n|_F and |A_n x_n|_F

/// Of how many training forwards one adds to the sums of products: a few hundred rows determine
/// them, so that the others need not pay for it.
constexpr int64_t kProductsEvery = 8;
/// What the earlier sums are multiplied with when one is added: they follow A and B as these
/// change.
constexpr double kProductsDecay = 0.9;

/// A ring of norms, and the sums of products; see above.
class RESLORA_API NormWindow {
 public:
  NormWindow() = default;
  /// An empty ring on `device`; throws c10::ValueError unless size (forwards) is in [1, 2^24].
  NormWindow(int64_t size, c10::Device device);
  /// Wraps tensors that exist: norms fp32 [2, N], count int64 [1] (forwards ever recorded; the next
  /// one goes to column count % N), on one device. Throws c10::ValueError for other shapes and
  /// dtypes, and for a count on the CPU that is negative.
  NormWindow(at::Tensor norms, at::Tensor count);
  /// The same with sums of products, which must be float32 [2r, 2r] on the same device; undefined:
  /// there are none.
  NormWindow(at::Tensor norms, at::Tensor count, at::Tensor products);

  /// False for a default-made one, which records nothing.
  bool is_defined() const { return norms_.defined(); }
  // What follows reads the device, and throws c10::ValueError for a count that is negative and for
  // tensors without values (on meta).

  /// Number of valid entries: min(forwards recorded, N).
  int64_t filled() const;
  /// Mean of the valid entries, nullopt while there are none (the paper's f_n).
  std::optional<double> mean(Norm which) const;

  /// True where sums of products are there and a forward added to them.
  bool has_products() const;

  /// The valid entries in the order of their forwards, fp32 [2, filled] on the CPU; [2, 0] where
  /// nothing is recorded.
  at::Tensor in_order() const;

  /// fp32 [2, N], rows as `Norm`.
  const at::Tensor& norms() const { return norms_; }
  /// int64 [1]: forwards ever recorded.
  const at::Tensor& count() const { return count_; }
  /// fp32 [2r, 2r], the decaying sum of [s u]^T [s u] over rows, where u = A_n x_n is the layer's
  /// own product and s what enters its B; undefined where nothing was summed.
  const at::Tensor& products() const { return products_; }

 private:
  at::Tensor norms_;
  at::Tensor count_;
  at::Tensor products_;
};

/// Makes the windows of several ranks one. `squares` [2, N] is the sum over ranks of the squared
/// norms; `norms` [2, N] become the roots of the mean over ranks: the norm of the whole batch but
/// for a constant factor, which alpha* does not see. Throws c10::ValueError for other shapes, for
/// tensors that are not floating, and for less than one rank.
RESLORA_API void set_to_mean_of_ranks(const at::Tensor& norms, const at::Tensor& squares,
                                      int64_t ranks);

}  // namespace reslora
