// The ring of norms: made, wrapped and read here; `adapt` writes it.
#include <ATen/Functions.h>
#include <c10/core/ScalarType.h>
#include <reslora/norm_window.h>

#include <algorithm>
#include <utility>

#include "core/check.h"

namespace reslora {

NormWindow::NormWindow(int64_t size, c10::Device device) {
  RESLORA_CHECK(size >= 1, "[norm_window] size must be at least 1; got {}", size);
  norms_ = at::zeros({2, size}, at::TensorOptions().dtype(at::kFloat).device(device));
  count_ = at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device));
}

NormWindow::NormWindow(at::Tensor norms, at::Tensor count)
    : norms_(std::move(norms)), count_(std::move(count)) {
  RESLORA_CHECK(norms_.defined() && count_.defined(),
                "[norm_window] norms and count must both be given; one of them is missing");
  RESLORA_CHECK(norms_.dim() == 2 && norms_.size(0) == 2 && norms_.size(1) >= 1 &&
                    norms_.scalar_type() == at::kFloat,
                "[norm_window] norms must be float32 [2, N] with N >= 1; got {} [{}]",
                c10::toString(norms_.scalar_type()), fmt::join(norms_.sizes(), ", "));
  RESLORA_CHECK(count_.dim() == 1 && count_.size(0) == 1 && count_.scalar_type() == at::kLong,
                "[norm_window] count must be int64 [1]; got {} [{}]",
                c10::toString(count_.scalar_type()), fmt::join(count_.sizes(), ", "));
}

int64_t NormWindow::filled() const {
  if (!is_defined()) return 0;
  const int64_t count = count_.item<int64_t>();
  RESLORA_CHECK(count >= 0, "[norm_window] count must not be negative; got {}", count);
  return std::min(count, norms_.size(1));
}

at::Tensor NormWindow::in_order() const {
  const int64_t entries = filled(), size = norms_.size(1);
  const at::Tensor norms = norms_.cpu();
  // In a full ring the next column to be written holds the oldest entry.
  return entries < size ? norms.narrow(1, 0, entries).clone()
                        : norms.roll(-(count_.item<int64_t>() % size), 1);
}

void set_to_mean_of_ranks(const at::Tensor& norms, const at::Tensor& squares, int64_t ranks) {
  RESLORA_CHECK(ranks >= 1 && norms.sizes() == squares.sizes(),
                "[norm_window] squares of at least one rank must have the shape of norms, [{}]; "
                "got [{}] of {}",
                fmt::join(norms.sizes(), ", "), fmt::join(squares.sizes(), ", "), ranks);
  norms.copy_((squares / ranks).sqrt());
}

std::optional<double> NormWindow::mean(Norm which) const {
  const int64_t entries = filled();
  if (entries == 0) return std::nullopt;
  // The ring is full or was filled from its start, so the valid entries are the first ones.
  const at::Tensor row = norms_.select(0, static_cast<int64_t>(which)).narrow(0, 0, entries);
  return row.to(at::kDouble).mean().item<double>();
}

}  // namespace reslora
