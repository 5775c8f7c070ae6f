/// @file
/// The last N norms of a layer's input, kept on the device for the merge rules.
///
/// `adapt` writes into the ring (no host sync); `mean` reads it once, at merge time. A statistic:
/// it never changes an output or a weight. The tensors are plain, not module buffers, so that casts
/// and DistributedDataParallel's broadcasts leave them alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <reslora/export.h>

#include <cstdint>
#include <optional>

namespace reslora {

/// Which norm of a layer is meant: a row of the ring.
enum class Norm : int64_t { kInput = 0, kOwnProduct = 1 };  // |x_n|_F and |A_n x_n|_F

/// A ring of norms; see above.
class RESLORA_API NormWindow {
 public:
  NormWindow() = default;
  /// An empty ring on `device`; throws c10::ValueError unless size (forwards) is in [1, 2^24].
  NormWindow(int64_t size, c10::Device device);
  /// Wraps tensors that exist: norms fp32 [2, N], count int64 [1] (forwards ever recorded; the next
  /// one goes to column count % N), on one device. Throws c10::ValueError for other shapes and
  /// dtypes, and for a count on the CPU that is negative.
  NormWindow(at::Tensor norms, at::Tensor count);

  /// False for a default-made one, which records nothing.
  bool is_defined() const { return norms_.defined(); }
  // What follows reads the device, and throws c10::ValueError for a count that is negative and for
  // tensors without values (on meta).

  /// Number of valid entries: min(forwards recorded, N).
  int64_t filled() const;
  /// Mean of the valid entries, nullopt while there are none (the paper's f_n).
  std::optional<double> mean(Norm which) const;

  /// The valid entries in the order of their forwards, fp32 [2, filled] on the CPU; [2, 0] where
  /// nothing is recorded.
  at::Tensor in_order() const;

  /// fp32 [2, N], rows as `Norm`.
  const at::Tensor& norms() const { return norms_; }
  /// int64 [1]: forwards ever recorded.
  const at::Tensor& count() const { return count_; }

 private:
  at::Tensor norms_;
  at::Tensor count_;
};

/// Makes the windows of several ranks one. `squares` [2, N] is the sum over ranks of the squared
/// norms; `norms` [2, N] become the roots of the mean over ranks: the norm of the whole batch but
/// for a constant factor, which alpha* does not see. Throws c10::ValueError for other shapes, for
/// tensors that are not floating, and for less than one rank.
RESLORA_API void set_to_mean_of_ranks(const at::Tensor& norms, const at::Tensor& squares,
                                      int64_t ranks);

}  // namespace reslora
