// Mapped model files and their edited copies; see model_files.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <reslora/model_files.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <utility>

#include "core/check.h"
#include "core/precision.h"
#include "io/mapped_file.h"
#include "io/tensor_types.h"
#include "merge/merged_weight.h"
#include "safetensors/safetensors.h"

namespace reslora {

using at::Tensor;
using detail::require;
using detail::shown;
using detail::TensorEntry;

namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;  // of rows in fp32: what stays in a core's cache

detail::Dtype file_type(at::ScalarType dtype) {
  return detail::entry_of("dtype", at::zeros({1}, dtype)).dtype;
}

}  // namespace

/// Where a tensor lies. A file is unmapped with the last tensor of it.
struct ModelFiles::Place {
  std::shared_ptr<const detail::MappedFile> map;
  std::string path;
  TensorEntry entry;

  const unsigned char* bytes() const { return map->data() + entry.begin; }
};

ModelFiles::ModelFiles(const std::vector<std::string>& paths) : paths_(paths) {
  for (const std::string& path : paths) {
    detail::on_file("model_files", path, [&] {
      const auto map = std::make_shared<const detail::MappedFile>(path);
      maps_.push_back(map);
      metadata_[path] = map->header().metadata;
      for (const TensorEntry& entry : map->header().tensors) {
        const auto place = std::make_shared<const Place>(Place{map, path, entry});
        const bool is_new = places_.emplace(entry.name, place).second;
        require(is_new, "tensor {} must be in one file; got it in {} too", shown(entry.name),
                shown(places_.at(entry.name)->path, 4096));
        names_.push_back(entry.name);
      }
    });
  }
}

const std::vector<std::string>& ModelFiles::names() const { return names_; }

const std::string& ModelFiles::path_of(const std::string& name) const {
  const auto found = places_.find(name);
  RESLORA_CHECK(found != places_.end(), "[model_files] a tensor must be in the files; got {}",
                shown(name));
  return found->second->path;
}

const std::map<std::string, std::string>& ModelFiles::metadata_of(const std::string& path) const {
  const auto found = metadata_.find(path);
  RESLORA_CHECK(found != metadata_.end(), "[model_files] the path must be one of the files; got {}",
                shown(path, 4096));
  return found->second;
}

std::map<std::string, std::vector<std::string>> ModelFiles::names_by_path(
    const std::map<std::string, TensorEdit>& edits) const {
  RESLORA_CHECK(!paths_.empty(), "[model_files] a model must have files to be copied; got none");
  std::map<std::string, std::vector<std::string>> names;
  for (const std::string& path : paths_) names[path];  // also one without tensors
  for (const std::string& name : names_) names[path_of(name)].push_back(name);
  for (const auto& [name, edit] : edits)
    if (!contains(name)) names[paths_.back()].push_back(name);
  return names;
}

Tensor ModelFiles::tensor(const std::string& name) const {
  path_of(name);  // refuses unknown names
  const auto place = places_.at(name);
  const auto options = at::TensorOptions().dtype(detail::scalar_type(place->entry.dtype));
  // from_blob wants a pointer to what may be written; the pages are read-only.
  auto* data = const_cast<unsigned char*>(place->bytes());
  return at::from_blob(
      data, place->entry.shape, [place](void*) {}, options);
}

void ModelFiles::check_unchanged() const {
  for (size_t i = 0; i < paths_.size(); ++i)
    detail::on_file("model_files", paths_[i], [&] { maps_[i]->check_unchanged(); });
}

namespace {

/// What is added to rows of a tensor in fp32 or fp64; the second argument is the first row.
using Change = std::function<void(Tensor&, int64_t)>;

/// One tensor on its way into the file.
struct Target {
  std::string name;
  Tensor source;  // [rows, columns]
  at::ScalarType dtype;
  Change change;
  uint64_t offset;  // in the file

  bool is_copied() const { return !change && dtype == source.scalar_type(); }
  at::ScalarType wide() const {
    return source.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  }
  int64_t row_bytes() const {
    return source.size(1) * static_cast<int64_t>(at::elementSize(dtype));
  }
};

/// Rows of a target, few enough for a cache.
struct Piece {
  const Target* target;
  int64_t first;
  int64_t rows;
};

std::vector<Piece> pieces_of(const std::vector<Target>& targets) {
  std::vector<Piece> pieces;
  for (const Target& target : targets) {
    const int64_t rows = target.source.size(0);
    const int64_t step = std::max<int64_t>(1, kPieceBytes / (4 * target.source.size(1)));
    for (int64_t first = 0; first < rows; first += step)
      pieces.push_back({&target, first, std::min(step, rows - first)});
  }
  return pieces;
}

/// cast(source + change) of a piece, dense.
Tensor merged_rows(const Piece& piece) {
  const Target& target = *piece.target;
  Tensor source = target.source.narrow(0, piece.first, piece.rows);
  if (target.is_copied()) return source;
  Tensor rows = source.to(target.wide(), /*non_blocking=*/false, /*copy=*/true);
  if (target.change) target.change(rows, piece.first);
  Tensor out = rows.to(target.dtype);
  require(target.dtype != at::kHalf || detail::is_finite(out),
          "tensor {} must be finite and fit into F16 (at most 65504); got NaN or infinity: take "
          "bfloat16",
          shown(target.name));
  return out;
}

/// Writes all pieces on torch's threads, each taking the next that is left: a thread computes while
/// another is in the system's write. The calling thread alone reports progress.
void write_pieces(detail::AtomicFile& file, const std::vector<Piece>& pieces,
                  const WriteOptions& options) {
  std::atomic<size_t> next{0};
  std::atomic<int64_t> written{0};
  const auto work = [&](bool reports) {
    const at::NoGradGuard no_grad;  // a thread of the pool has a state of its own
    try {
      for (size_t i = next++; i < pieces.size(); i = next++) {
        const Tensor rows = merged_rows(pieces[i]);
        const Target& target = *pieces[i].target;
        file.write_at(target.offset + static_cast<uint64_t>(pieces[i].first * target.row_bytes()),
                      rows.const_data_ptr(), rows.nbytes());
        written += static_cast<int64_t>(rows.nbytes());
        if (reports && options.progress) options.progress(written);
      }
    } catch (...) {
      next = pieces.size();  // the other threads stop too
      throw;
    }
  };
  at::parallel_for(0, at::get_num_threads(), 1,
                   [&](int64_t begin, int64_t) { work(/*reports=*/begin == 0); });
  if (options.progress) options.progress(written);
}

/// Adds what a layer adds to the rows of its weight or bias from `first` on.
Change change_of(const TensorEdit& edit, at::ScalarType wide) {
  if (!edit.layer) return nullptr;
  const LayerMerge& layer = *edit.layer;
  if (edit.is_bias) {
    const Tensor bias = layer.bias.to(at::kCPU, wide).unsqueeze(1);
    return [bias](Tensor& rows, int64_t first) { rows.add_(bias.narrow(0, first, rows.size(0))); };
  }
  const Tensor left = (edit.is_transposed ? layer.A.t() : layer.B).to(wide).contiguous();
  const Tensor right = (edit.is_transposed ? layer.B.t() : layer.A).to(wide).contiguous();
  return [left, right](Tensor& rows, int64_t first) {
    const Tensor some = left.narrow(0, first, rows.size(0));
    if (some.is_cpu()) {
      detail::add_product_(rows, some, right);
    } else {
      rows.add_(at::mm(some, right).to(at::kCPU));
    }
  };
}

void check_edit(const std::string& name, const Tensor& source, const TensorEdit& edit) {
  if (!edit.layer) return;
  const LayerMerge& layer = *edit.layer;
  detail::check_pair(layer, "merge_files");
  std::vector<int64_t> wanted = {layer.B.size(0), layer.A.size(1)};
  if (edit.is_transposed) std::swap(wanted[0], wanted[1]);
  if (edit.is_bias) wanted = {layer.B.size(0)};
  require(source.sizes() == at::IntArrayRef(wanted),
          "tensor {} must be {} to take layer {}; got {}: is this the base of the adapter?",
          shown(name), c10::str(at::IntArrayRef(wanted)), shown(layer.name),
          c10::str(source.sizes()));
  const auto dtype = source.scalar_type();
  require(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "tensor {} must be F64, F32, F16 or BF16 to be merged into; got {}: merge into the "
      "original, unquantised files",
      shown(name), c10::toString(dtype));
  require(!edit.is_bias || layer.bias.defined(), "layer {} adds no bias", shown(layer.name));
}

/// Refuses edits that would be lost: of tensors that no file holds, and of weights whose layers
/// move a bias too.
void check_edits(const ModelFiles& files, const std::map<std::string, TensorEdit>& edits) {
  std::set<std::string> moved;  // layers whose bias is edited
  for (const auto& [name, edit] : edits) {
    RESLORA_CHECK(edit.replacement || files.contains(name),
                  "[merge_files] an edit must be of a tensor in the files, or bring one; got {}",
                  shown(name));
    if (edit.layer && edit.is_bias) moved.insert(edit.layer->name);
  }
  for (const auto& [name, edit] : edits)
    RESLORA_CHECK(!edit.layer || !edit.layer->bias.defined() || moved.count(edit.layer->name) > 0,
                  "[merge_files] a layer that moves its bias must have an edit of it beside that "
                  "of its weight; got {} of layer {} alone: plan without use_affine, or take the "
                  "edits of AdaptedFiles",
                  shown(name), shown(edit.layer->name));
}

/// The tensors of a file with what is done to each; empty ones need nothing.
std::vector<Target> targets_of(
    const detail::Header& header, uint64_t begin, const std::map<std::string, Tensor>& sources,
    const std::function<const TensorEdit&(const std::string&)>& edit_of) {
  std::vector<Target> targets;
  for (const TensorEntry& entry : header.tensors) {
    const Tensor& source = sources.at(entry.name);
    if (source.numel() == 0) continue;
    Target target;
    target.name = entry.name;
    target.source = source.dim() > 1 ? source.flatten(1) : source.reshape({-1, 1});
    target.dtype = detail::scalar_type(entry.dtype);
    target.change = change_of(edit_of(entry.name), target.wide());
    target.offset = begin + entry.begin;
    targets.push_back(std::move(target));
  }
  return targets;
}

}  // namespace

void ModelFiles::write(const std::string& path, const std::vector<std::string>& names,
                       const std::map<std::string, TensorEdit>& edits,
                       const WriteOptions& options) const {
  RESLORA_CHECK(!options.dtype || *options.dtype == at::kFloat || *options.dtype == at::kDouble ||
                    *options.dtype == at::kHalf || *options.dtype == at::kBFloat16,
                "[merge_files] dtype must be float32, float64, float16 or bfloat16; got {}",
                c10::toString(*options.dtype));
  check_edits(*this, edits);
  const detail::FullPrecision guard;
  detail::on_file("merge_files", path, [&] {
    detail::Header header;
    header.metadata = options.metadata;
    std::map<std::string, Tensor> sources;
    const TensorEdit none;
    const auto edit_of = [&](const std::string& name) -> const TensorEdit& {
      const auto found = edits.find(name);
      return found == edits.end() ? none : found->second;
    };
    for (const std::string& name : names) {
      const TensorEdit& edit = edit_of(name);
      if (edit.replacement)
        detail::entry_of(name, *edit.replacement);  // refuses what files cannot hold
      const Tensor source = edit.replacement ? detail::file_order(*edit.replacement) : tensor(name);
      check_edit(name, source, edit);
      TensorEntry entry;
      entry.name = name;
      entry.dtype = file_type(source.scalar_type());
      if (options.dtype && at::isFloatingType(source.scalar_type())) {
        entry.dtype = file_type(*options.dtype);
      }
      entry.shape = source.sizes().vec();
      header.tensors.push_back(entry);
      sources.emplace(name, source);
    }
    detail::assign_spans_(header);
    const std::string front = detail::serialize_header(header);
    const std::vector<Target> targets = targets_of(header, front.size(), sources, edit_of);
    detail::AtomicFile out(path);
    out.write(front.data(), front.size());
    try {
      write_pieces(out, pieces_of(targets), options);
    } catch (...) {  // such as a bad address, from the system that reads a page which has gone
      check_unchanged();
      throw;
    }
    check_unchanged();
    out.commit();
  });
}

}  // namespace reslora
