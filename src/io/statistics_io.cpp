// Statistics in and out of a safetensors file; see statistics_io.h.
#include <ATen/Functions.h>
#include <reslora/adapter_folder.h>
#include <reslora/adapter_io.h>
#include <reslora/matching.h>
#include <reslora/statistics_io.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/tensor_checks.h"
#include "io/factor_names.h"
#include "io/folders.h"
#include "io/tensor_types.h"
#include "io/unfinished.h"
#include "safetensors/json.h"
#include "safetensors/safetensors.h"

namespace reslora {
namespace {

using at::Tensor;
using detail::require;
using detail::shown;

constexpr const char* kFormatKey = "reslora.statistics";
// 2 may say which weights it was saved with, 3 has sums of products.
constexpr const char* kFormats[] = {"1", "2", "3"};
constexpr const char* kWeightsKey = "reslora.weights_sha256";
constexpr const char* kSumKey = "reslora.adapter_sum";
constexpr const char* kContentKey = "reslora.sha256";
constexpr const char* kOwnersKey = "reslora.shared_xx";

Tensor numbers(const std::vector<double>& values) { return at::tensor(values, at::kDouble); }

void put(std::map<std::string, Tensor>& tensors, const std::string& key, const Tensor& tensor,
         at::ScalarType dtype) {
  if (tensor.defined()) tensors[key] = tensor.to(dtype);
}

void put_fit(std::map<std::string, Tensor>& tensors, const std::string& name, const Fit& fit) {
  if (!fit.A.defined()) return;
  // One dtype for all, as it is read.
  const auto dtype = fit.A.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  put(tensors, name + ".fit_A", fit.A, dtype);
  put(tensors, name + ".fit_B", fit.B, dtype);
  if (fit.affine_A.defined() && fit.offset.defined()) {
    put(tensors, name + ".affine_A", fit.affine_A, dtype);
    put(tensors, name + ".offset", fit.offset, dtype);
  }
  tensors[name + ".fit"] =
      numbers({fit.alpha_star, fit.residual, fit.affine_residual, static_cast<double>(fit.rows),
               static_cast<double>(fit.refine_steps)});
}

std::string owners_json(const std::map<std::string, std::string>& owners) {
  detail::JsonWriter json;
  json.begin_object();
  for (const auto& [layer, owner] : owners) json.key(layer).string(owner);
  return json.end_object().text();
}

/// The tensors of one file, taken out by name; what is left at the end is unexpected.
class Contents {
 public:
  explicit Contents(std::map<std::string, Tensor> tensors) : tensors_(std::move(tensors)) {}

  bool has(const std::string& key) const { return tensors_.count(key) > 0; }

  Tensor take(const std::string& key, at::ScalarType dtype, std::vector<int64_t> sizes) {
    const auto found = tensors_.find(key);
    require(found != tensors_.end(), "tensor {} must be there; got none", shown(key));
    Tensor tensor = found->second;
    for (size_t i = 0; i < sizes.size() && tensor.dim() == static_cast<int64_t>(sizes.size());
         ++i) {
      if (sizes[i] < 0) sizes[i] = tensor.size(static_cast<int64_t>(i));
    }
    require(tensor.sizes() == at::IntArrayRef(sizes) && tensor.scalar_type() == dtype,
            "tensor {} must be {} {}; got {} {}", shown(key), c10::toString(dtype),
            c10::str(at::IntArrayRef(sizes)), c10::toString(tensor.scalar_type()),
            c10::str(tensor.sizes()));
    tensors_.erase(found);
    return tensor;
  }

  std::vector<double> take_numbers(const std::string& key, int64_t count) {
    const Tensor tensor = take(key, at::kDouble, {count});
    const auto* data = tensor.const_data_ptr<double>();
    const bool is_finite =
        std::all_of(data, data + count, [](double v) { return std::isfinite(v); });
    require(is_finite, "the numbers of {} must be finite; got NaN or infinity", shown(key));
    return {data, data + count};
  }

  at::ScalarType dtype_of(const std::string& key) const { return tensors_.at(key).scalar_type(); }
  const std::map<std::string, Tensor>& rest() const { return tensors_; }

 private:
  std::map<std::string, Tensor> tensors_;
};

/// A count that a file holds as a number.
int64_t count_of(double value, const std::string& key) {
  require(value >= 0 && value < 9e15 && value == std::floor(value),
          "counts in {} must be whole numbers of at least 0; got {}", shown(key), value);
  return static_cast<int64_t>(value);
}

Fit take_fit(Contents& contents, const std::string& name) {
  Fit fit;
  if (!contents.has(name + ".fit_A")) return fit;
  const at::ScalarType dtype = contents.dtype_of(name + ".fit_A");
  require(dtype == at::kFloat || dtype == at::kDouble, "tensor {} must be F32 or F64; got {}",
          shown(name + ".fit_A"), c10::toString(dtype));
  fit.A = contents.take(name + ".fit_A", dtype, {-1, -1});
  require(at::isfinite(fit.A).all().item<bool>(), "tensor {} must be finite; got NaN or infinity",
          shown(name + ".fit_A"));
  const int64_t r = fit.A.size(0);
  const int64_t in = fit.A.size(1);
  if (contents.has(name + ".fit_B")) fit.B = contents.take(name + ".fit_B", dtype, {-1, r});
  if (contents.has(name + ".offset")) {
    fit.affine_A = contents.take(name + ".affine_A", dtype, {r, in});
    fit.offset = contents.take(name + ".offset", dtype, {r});
  }
  const std::vector<double> values = contents.take_numbers(name + ".fit", 5);
  fit.alpha_star = values[0];
  fit.residual = values[1];
  fit.affine_residual = values[2];
  fit.rows = count_of(values[3], name + ".fit");
  fit.refine_steps = count_of(values[4], name + ".fit");
  return fit;
}

std::map<std::string, std::string> read_owners(const std::string& json) {
  std::map<std::string, std::string> owners;
  detail::JsonReader reader(json, kOwnersKey);
  reader.object([&](const std::string& layer) { owners[layer] = reader.string(); });
  reader.finish();
  return owners;
}

std::map<std::string, LayerStatistics> read(TensorFile file) {
  const std::map<std::string, std::string> owners = read_owners(file.metadata.at(kOwnersKey));
  std::set<std::string> layers;
  for (const auto& [key, tensor] : file.tensors) layers.insert(key.substr(0, key.rfind('.')));
  Contents contents(std::move(file.tensors));
  std::map<std::string, Tensor> xx;
  for (const auto& [layer, owner] : owners) {
    require(layers.count(layer) > 0, "{} must name layers of the file; got {}", kOwnersKey,
            shown(layer));
    if (xx.count(owner) == 0) xx[owner] = contents.take(owner + ".xx", at::kDouble, {-1, -1});
  }
  std::map<std::string, LayerStatistics> statistics;
  for (const std::string& name : layers) {
    LayerStatistics& own = statistics[name];
    if (contents.has(name + ".norms")) {
      const Tensor count = contents.take(name + ".norm_count", at::kLong, {1});
      require(count.item<int64_t>() >= 0, "tensor {} must not be negative",
              shown(name + ".norm_count"));
      const Tensor norms = contents.take(name + ".norms", at::kFloat, {2, -1});
      Tensor products;
      if (contents.has(name + ".products")) {
        products = contents.take(name + ".products", at::kFloat, {-1, -1});
        require(products.size(0) == products.size(1) && products.size(0) % 2 == 0,
                "tensor {} must be [2r, 2r]", shown(name + ".products"));
      }
      own.norms = NormWindow(norms, count, products);
    }
    own.fit = take_fit(contents, name);
    const auto owner = owners.find(name);
    if (owner == owners.end()) continue;
    const Tensor& own_xx = xx.at(owner->second);
    const int64_t in = own_xx.size(0);
    require(own_xx.size(1) == in, "tensor {} must be square", shown(owner->second + ".xx"));
    FitSums sums;
    sums.xx = own_xx;
    sums.vx = contents.take(name + ".vx", at::kDouble, {-1, in});
    sums.x_sum = contents.take(name + ".x_sum", at::kDouble, {in});
    sums.v_sum = contents.take(name + ".v_sum", at::kDouble, {sums.vx.size(0)});
    const std::vector<double> values = contents.take_numbers(name + ".sums", 2);
    sums.vv = values[0];
    sums.rows = count_of(values[1], name + ".sums");
    own.sums = sums;
  }
  require(contents.rest().empty(), "statistics must hold known tensors only; got {}",
          contents.rest().empty() ? "" : shown(contents.rest().begin()->first));
  return statistics;
}

}  // namespace

void save_statistics(const std::string& path, const std::string& adapter_sum,
                     const std::map<std::string, LayerStatistics>& statistics,
                     const std::string& weights_sum) {
  TensorFile file;
  std::map<std::string, std::string> owners;
  std::map<const void*, std::string> owner_of;
  for (const auto& [name, own] : statistics) {
    if (own.norms.is_defined()) {
      file.tensors[name + ".norms"] = own.norms.norms();
      file.tensors[name + ".norm_count"] = own.norms.count();
      put(file.tensors, name + ".products", own.norms.products(), at::kFloat);
    }
    put_fit(file.tensors, name, own.fit);
    if (!own.sums) continue;
    const FitSums& sums = *own.sums;
    RESLORA_CHECK(
        detail::is_dense(sums.xx) && detail::is_dense(sums.vx) && detail::is_dense(sums.x_sum) &&
            detail::is_dense(sums.v_sum),
        "[save_statistics] sums must hold xx, vx, x_sum and v_sum, dense tensors; got {}, "
        "{}, {} and {} (layer {})",
        detail::described(sums.xx), detail::described(sums.vx), detail::described(sums.x_sum),
        detail::described(sums.v_sum), name);
    const auto [owner, is_new] = owner_of.emplace(sums.xx.const_data_ptr(), name);
    owners[name] = owner->second;
    if (is_new) file.tensors[name + ".xx"] = sums.xx;
    file.tensors[name + ".vx"] = sums.vx;
    file.tensors[name + ".x_sum"] = sums.x_sum;
    file.tensors[name + ".v_sum"] = sums.v_sum;
    file.tensors[name + ".sums"] = numbers({sums.vv, static_cast<double>(sums.rows)});
  }
  file.metadata = {{"format", "pt"},
                   {kFormatKey, kFormats[2]},
                   {kSumKey, adapter_sum},
                   {kOwnersKey, owners_json(owners)},
                   {kContentKey, tensors_sum(file.tensors)}};
  if (!weights_sum.empty()) file.metadata[kWeightsKey] = weights_sum;
  // What `load_statistics` would refuse is not written.
  detail::on_file("save_statistics", path, [&] { read(file); });
  save_tensors(path, file);
}

std::map<std::string, LayerStatistics> load_statistics(const std::string& path,
                                                       const std::string& adapter_sum) {
  TensorFile file = load_tensors(path);
  return detail::on_file("load_statistics", path, [&] {
    const auto format = file.metadata.find(kFormatKey);
    require(format != file.metadata.end(), "is no file of statistics: its metadata has no {}",
            kFormatKey);
    for (const char* key : {kSumKey, kOwnersKey, kContentKey}) {
      require(file.metadata.count(key) > 0, "the metadata must have {}; got none", key);
    }
    require(std::count(std::begin(kFormats), std::end(kFormats), format->second) > 0,
            "statistics must be of format {}; got {}", fmt::join(kFormats, " or "),
            shown(format->second));
    require(file.metadata.at(kSumKey) == adapter_sum,
            "statistics must be of the adapter that they are loaded for; got those of another one: "
            "calibrate again, or leave the file out");
    const bool is_intact = tensors_sum(file.tensors) == file.metadata.at(kContentKey);
    std::map<std::string, LayerStatistics> statistics = read(std::move(file));
    require(
        is_intact,
        "the content must have the checksum that {} gives; got another, so the file was damaged "
        "or altered: calibrate and save again",
        kContentKey);
    return statistics;
  });
}

namespace {

/// The sum of the weights that a file of statistics was saved with; empty where it does not say.
std::string weights_sum_in(const std::string& path) {
  return detail::on_file("load_statistics", path, [&] {
    detail::InputFile file(path);
    const detail::Header header = detail::read_header(file);
    const auto found = header.metadata.find(kWeightsKey);
    return found == header.metadata.end() ? std::string() : found->second;
  });
}

/// The file of the statistics that belong to weights of this sum, or that do not say to which;
/// empty where there is none.
std::string place_of_statistics(const std::string& folder, const std::string& sum) {
  const std::string path = detail::in_folder(folder, kStatisticsName);
  RESLORA_CHECK(detail::is_file(path) || !detail::exists(path),
                "[load] {} must be a file, or not there; got something else", shown(path, 4096));
  std::string unmarked;
  for (const std::string& place : detail::places_of(folder, kStatisticsName)) {
    if (!detail::is_file(place)) continue;
    const std::string own = weights_sum_in(place);
    if (own == sum) return place;
    if (own.empty() && place == path) unmarked = path;
  }
  if (unmarked.empty() && detail::is_file(path))
    TORCH_WARN("[load] ", shown(path, 4096), " was saved with other weights than ", kWeightsName,
               " and is left out: calibrate again, or merge by a rule that needs no data");
  return unmarked;
}

}  // namespace

std::map<std::string, LayerStatistics> statistics_beside(const std::string& folder,
                                                         const AdapterFile& adapter) {
  const std::string path = place_of_statistics(folder, adapter.sum);
  if (path.empty()) return {};
  const std::string& former = adapter.former_sum;
  std::map<std::string, LayerStatistics> statistics;
  for (auto& [name, own] :
       load_statistics(path, former.empty() ? detail::sum_of_factors(adapter.tensors) : former))
    statistics.emplace(plain_name(name), std::move(own));
  std::map<std::string, LayerShape> layers;
  for (const ChainRecord& chain : adapter.chains)
    for (const LayerShape& layer : chain.layers) layers.emplace(layer.name, layer);
  for (const auto& [name, own] : statistics) {
    const auto layer = layers.find(name);
    RESLORA_CHECK(layer != layers.end(),
                  "[load] statistics must be of layers of the adapter; got {}", name);
    const Fit& fit = own.fit;
    if (!fit.A.defined()) continue;
    const int64_t rank = fit.B.defined() ? fit.A.size(0) : layer->second.r;  // of its own B: any
    RESLORA_CHECK(fit.A.sizes() == at::IntArrayRef({rank, layer->second.in_features}),
                  "[load] a fit must have the shape of A, [{}, {}]; got [{}] for {}", rank,
                  layer->second.in_features, fmt::join(fit.A.sizes(), ", "), name);
  }
  return statistics;
}

}  // namespace reslora
