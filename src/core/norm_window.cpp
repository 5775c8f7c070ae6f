// The ring of norms: made, wrapped and read here; `adapt` writes it.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/ScalarType.h>
#include <reslora/norm_window.h>

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/config_options.h"
#include "core/tensor_checks.h"

namespace reslora {
namespace {

void check_count(int64_t count) {
  RESLORA_CHECK(count >= 0, "[norm_window] count must not be negative; got {}", count);
}

}  // namespace

NormWindow::NormWindow(int64_t size, c10::Device device) {
  RESLORA_CHECK(size >= 1 && size <= detail::kMaxNormWindow,
                "[norm_window] size must be at least 1 and at most {}; got {}",
                detail::kMaxNormWindow, size);
  norms_ = at::zeros({2, size}, at::TensorOptions().dtype(at::kFloat).device(device));
  count_ = at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device));
}

NormWindow::NormWindow(at::Tensor norms, at::Tensor count, at::Tensor products)
    : NormWindow(std::move(norms), std::move(count)) {
  products_ = std::move(products);
  if (!products_.defined()) return;
  RESLORA_CHECK(detail::is_dense(products_) && products_.dim() == 2 && products_.size(0) >= 2 &&
                    products_.size(0) % 2 == 0 && products_.size(0) == products_.size(1) &&
                    products_.scalar_type() == at::kFloat && products_.device() == norms_.device(),
                "[norm_window] products must be float32 [2r, 2r] on the device of norms; got {}",
                detail::described(products_));
}

NormWindow::NormWindow(at::Tensor norms, at::Tensor count)
    : norms_(std::move(norms)), count_(std::move(count)) {
  RESLORA_CHECK(norms_.defined() && count_.defined(),
                "[norm_window] norms and count must both be given; one of them is missing");
  RESLORA_CHECK(detail::is_dense(norms_) && norms_.dim() == 2 && norms_.size(0) == 2 &&
                    norms_.size(1) >= 1 && norms_.scalar_type() == at::kFloat,
                "[norm_window] norms must be float32 [2, N] with N >= 1; got {}",
                detail::described(norms_));
  RESLORA_CHECK(detail::is_dense(count_) && count_.dim() == 1 && count_.size(0) == 1 &&
                    count_.scalar_type() == at::kLong && count_.device() == norms_.device(),
                "[norm_window] count must be int64 [1] on the device of norms; got {}",
                detail::described(count_));
  if (count_.is_cpu()) check_count(count_.item<int64_t>());
}

int64_t NormWindow::filled() const {
  if (!is_defined()) return 0;
  RESLORA_CHECK(!norms_.is_meta(), "[norm_window] norms must have values; got {}",
                detail::described(norms_));
  const int64_t count = count_.item<int64_t>();
  check_count(count);
  return std::min(count, norms_.size(1));
}

bool NormWindow::has_products() const {
  if (!products_.defined()) return false;
  RESLORA_CHECK(!products_.is_meta(), "[norm_window] products must have values; got {}",
                detail::described(products_));
  return products_.any().item<bool>();
}

at::Tensor NormWindow::in_order() const {
  const int64_t entries = filled();
  if (entries == 0) return at::zeros({2, 0}, at::kFloat);
  const int64_t size = norms_.size(1);
  const at::Tensor norms = norms_.cpu();
  // In a full ring the next column to be written holds the oldest entry.
  return entries < size ? norms.narrow(1, 0, entries).clone()
                        : norms.roll(-(count_.item<int64_t>() % size), 1);
}

void set_to_mean_of_ranks(const at::Tensor& norms, const at::Tensor& squares, int64_t ranks) {
  detail::check_floating(norms, {2, detail::kAny}, "norm_window", "norms");
  RESLORA_CHECK(ranks >= 1 && detail::is_dense(squares) && !squares.is_meta() &&
                    at::isFloatingType(squares.scalar_type()) && norms.sizes() == squares.sizes(),
                "[norm_window] squares of at least one rank must have the shape of norms, [{}]; "
                "got {} of {}",
                fmt::join(norms.sizes(), ", "), detail::described(squares), ranks);
  norms.copy_((squares / ranks).sqrt());
}

std::optional<double> NormWindow::mean(Norm which) const {
  RESLORA_CHECK(which == Norm::kInput || which == Norm::kOwnProduct,
                "[norm_window] which must be one of those of `Norm`; got {}",
                static_cast<int64_t>(which));
  const int64_t entries = filled();
  if (entries == 0) return std::nullopt;
  // The ring is full or was filled from its start, so the valid entries are the first ones.
  const at::Tensor row = norms_.select(0, static_cast<int64_t>(which)).narrow(0, 0, entries);
  return row.to(at::kDouble).mean().item<double>();
}

}  // namespace reslora
