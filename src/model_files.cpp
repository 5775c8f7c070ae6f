// Mapped model files and their edited copies; see model_files.h.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <reslora/model_files.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <future>
#include <set>
#include <system_error>
#include <utility>

#include "detail/check.h"
#include "detail/safetensors.h"
#include "internal/merged_weight.h"
#include "internal/precision.h"
#include "internal/tensor_types.h"

namespace reslora {

using at::Tensor;
using detail::require;
using detail::shown;
using detail::TensorEntry;

namespace {

constexpr int64_t kCopyBytes = int64_t{16} << 20;
constexpr int64_t kStripBytes = int64_t{1} << 20;  // of rows in fp32: what stays in a core's cache

detail::Dtype file_type(at::ScalarType dtype) {
  return detail::entry_of("dtype", at::zeros({1}, dtype)).dtype;
}

}  // namespace

/// A file in memory, unmapped with its last tensor.
struct ModelFiles::Map {
  explicit Map(const std::string& path) {
    detail::InputFile file(path);  // checks that it is a regular file
    header = detail::read_header(file);
    size = file.size();
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    void* at =
        descriptor < 0 ? MAP_FAILED : ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
    const int error = errno;
    if (descriptor >= 0) ::close(descriptor);
    if (at == MAP_FAILED) {
      throw detail::FileError("the file cannot be mapped: " +
                              std::generic_category().message(error));
    }
    base = static_cast<unsigned char*>(at);
    ::madvise(base, size, MADV_SEQUENTIAL);
  }
  ~Map() { ::munmap(base, size); }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  const unsigned char* data() const {
    const uint64_t length = header.tensors.empty() ? 0 : header.tensors.back().end;
    return base + (size - length);
  }

  detail::Header header;
  unsigned char* base = nullptr;
  uint64_t size = 0;
};

struct ModelFiles::Place {
  std::shared_ptr<const Map> map;
  std::string path;
  TensorEntry entry;

  const unsigned char* bytes() const { return map->data() + entry.begin; }
};

ModelFiles::ModelFiles(const std::vector<std::string>& paths) {
  for (const std::string& path : paths) {
    detail::on_file("model_files", path, [&] {
      const auto map = std::make_shared<const Map>(path);
      metadata_[path] = map->header.metadata;
      for (const TensorEntry& entry : map->header.tensors) {
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

Tensor ModelFiles::tensor(const std::string& name) const {
  path_of(name);  // refuses unknown names
  const auto place = places_.at(name);
  const auto options = at::TensorOptions().dtype(detail::scalar_type(place->entry.dtype));
  // from_blob wants a pointer to what may be written; the pages are read-only.
  auto* data = const_cast<unsigned char*>(place->bytes());
  return at::from_blob(
      data, place->entry.shape, [place](void*) {}, options);
}

namespace {

/// out = cast(source + change), where `source` is rows from `first` on. Threads work on strips of
/// rows that stay in a core's cache.
void sum_strips(const Tensor& source, int64_t first, int64_t strip, at::ScalarType wide,
                const std::function<void(Tensor&, int64_t)>& change, const Tensor& out) {
  const int64_t rows = source.size(0);
  at::parallel_for(0, (rows + strip - 1) / strip, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard no_grad;  // a thread of the pool has a state of its own
    for (int64_t row = begin * strip; row < std::min(end * strip, rows); row += strip) {
      const int64_t count = std::min(strip, rows - row);
      Tensor part = source.narrow(0, row, count).to(wide, /*non_blocking=*/false, /*copy=*/true);
      if (change) change(part, first + row);
      out.narrow(0, row, count).copy_(part);
    }
  });
}

/// Writes tensors one after the other, by rows.
class Writer {
 public:
  Writer(const std::string& path, const std::string& front, const WriteOptions& options)
      : file_(path), options_(options) {
    file_.write(front.data(), front.size());
  }

  void raw(const unsigned char* bytes, int64_t size) {
    for (int64_t at = 0; at < size; at += kCopyBytes) {
      const int64_t count = std::min(kCopyBytes, size - at);
      file_.write(bytes + at, count);
      note(count);
    }
  }

  /// Casts and writes `source`, changed by `change(rows in fp32, the first row)`: what one buffer
  /// holds is written while the next is computed.
  void rows(const std::string& name, const Tensor& source, at::ScalarType dtype,
            const std::function<void(Tensor&, int64_t)>& change) {
    const Tensor matrix = source.dim() > 1 ? source.flatten(1) : source.reshape({-1, 1});
    const auto wide = source.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const int64_t row_bytes = std::max<int64_t>(1, matrix.size(1) * 4);
    const int64_t strip = std::max<int64_t>(1, kStripBytes / row_bytes);
    const int64_t step = std::max<int64_t>(strip, kCopyBytes / row_bytes);
    const int64_t most = std::min(step, matrix.size(0));
    std::array<Tensor, 2> buffers;
    for (Tensor& buffer : buffers) buffer = at::empty({most, matrix.size(1)}, dtype);
    std::future<void> writing;  // of the other buffer; ends before `buffers` do
    for (int64_t row = 0, turn = 0; row < matrix.size(0); row += step, turn ^= 1) {
      const int64_t count = std::min(step, matrix.size(0) - row);
      const Tensor out = buffers[turn].narrow(0, 0, count);
      sum_strips(matrix.narrow(0, row, count), row, strip, wide, change, out);
      require(
          dtype != at::kHalf || detail::is_finite(out),
          "tensor {} must be finite and fit into F16 (at most 65504); got NaN or infinity: take "
          "bfloat16",
          shown(name));
      if (writing.valid()) writing.get();
      writing = std::async(std::launch::async,
                           [this, out] { file_.write(out.const_data_ptr(), out.nbytes()); });
      note(static_cast<int64_t>(out.nbytes()));
    }
    if (writing.valid()) writing.get();
  }

  void commit() { file_.commit(); }

 private:
  void note(int64_t bytes) {
    written_ += bytes;
    if (options_.progress) options_.progress(written_);
  }

  detail::AtomicFile file_;
  const WriteOptions& options_;
  int64_t written_ = 0;
};

/// Adds what a layer adds to the rows of its weight or bias from `first` on.
std::function<void(Tensor&, int64_t)> change_of(const TensorEdit& edit, at::ScalarType wide) {
  if (!edit.layer) return nullptr;
  const LayerMerge& layer = *edit.layer;
  if (edit.is_bias) {
    const Tensor bias = layer.bias.to(at::kCPU, wide).unsqueeze(1);
    return [bias](Tensor& rows, int64_t first) { rows.add_(bias.narrow(0, first, rows.size(0))); };
  }
  const Tensor left = (edit.is_transposed ? layer.A.t() : layer.B).to(wide);
  const Tensor right = (edit.is_transposed ? layer.B.t() : layer.A).to(wide);
  return [left, right](Tensor& rows, int64_t first) {
    const Tensor some = left.narrow(0, first, rows.size(0));
    if (some.is_cpu()) {
      rows.addmm_(some, right);
    } else {
      rows.add_(at::mm(some, right).to(at::kCPU));
    }
  };
}

void check_edit(const std::string& name, const Tensor& source, const TensorEdit& edit) {
  if (!edit.layer) return;
  const LayerMerge& layer = *edit.layer;
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

}  // namespace

void ModelFiles::write(const std::string& path, const std::vector<std::string>& names,
                       const std::map<std::string, TensorEdit>& edits,
                       const WriteOptions& options) const {
  RESLORA_CHECK(!options.dtype || *options.dtype == at::kFloat || *options.dtype == at::kDouble ||
                    *options.dtype == at::kHalf || *options.dtype == at::kBFloat16,
                "[merge_files] dtype must be float32, float64, float16 or bfloat16; got {}",
                c10::toString(*options.dtype));
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
    Writer out(path, detail::serialize_header(header), options);
    for (const TensorEntry& entry : header.tensors) {
      const Tensor& source = sources.at(entry.name);
      const auto dtype = detail::scalar_type(entry.dtype);
      const TensorEdit& edit = edit_of(entry.name);
      if (!edit.layer && dtype == source.scalar_type()) {
        out.raw(static_cast<const unsigned char*>(source.const_data_ptr()),
                static_cast<int64_t>(entry.size()));
      } else {
        const auto wide = source.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        out.rows(entry.name, source, dtype, change_of(edit, wide));
      }
    }
    out.commit();
  });
}

}  // namespace reslora
