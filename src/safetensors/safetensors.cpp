// Header parser, header writer, and the reading and atomic writing of files; see safetensors.h.
#include "safetensors/safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors files are little endian, and so must be the machine"
#endif

namespace reslora::detail {
namespace {

struct DtypeRow {
  const char* name;
  uint64_t size;
};

constexpr std::array<DtypeRow, 12> kDtypes{{{"F64", 8},
                                            {"I64", 8},
                                            {"F32", 4},
                                            {"I32", 4},
                                            {"F16", 2},
                                            {"BF16", 2},
                                            {"I16", 2},
                                            {"F8_E4M3", 1},
                                            {"F8_E5M2", 1},
                                            {"I8", 1},
                                            {"U8", 1},
                                            {"BOOL", 1}}};  // in the order of Dtype

constexpr uint64_t kMaxSize = std::numeric_limits<int64_t>::max();

[[noreturn]] void refuse(const std::string& sentence) { throw ContentError(sentence); }

// Repeats a system call that a signal interrupted.
template <typename Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

[[noreturn]] void refuse_system(const std::string& what, int error) {
  throw FileError(what + ": " + std::strerror(error));
}

Dtype parse_dtype(const std::string& name, const std::string& tensor) {
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    if (name == kDtypes[i].name) return static_cast<Dtype>(i);
  }
  refuse("tensor " + shown(tensor) +
         " must be of F64, I64, F32, I32, F16, BF16, I16, F8_E4M3, F8_E5M2, I8, U8 or BOOL; got " +
         shown(name));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

std::vector<int64_t> parse_shape(JsonReader& reader, const std::string& tensor) {
  std::vector<int64_t> shape;
  reader.array([&] {
    const uint64_t size = reader.unsigned_integer();
    if (size > kMaxSize) {
      refuse("tensor " + shown(tensor) + " must have dimensions below 2^63; got " +
             std::to_string(size));
    }
    if (shape.size() == kMaxRank) {
      refuse("tensor " + shown(tensor) + " must have at most " + std::to_string(kMaxRank) +
             " dimensions; got more");
    }
    shape.push_back(static_cast<int64_t>(size));
  });
  return shape;
}

void parse_span(JsonReader& reader, TensorEntry& entry) {
  std::vector<uint64_t> offsets;
  reader.array([&] {
    if (offsets.size() < 3) offsets.push_back(reader.unsigned_integer());
    if (offsets.size() == 3) {
      refuse("tensor " + shown(entry.name) + " must have two data_offsets; got more");
    }
  });
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    refuse("tensor " + shown(entry.name) +
           " must have two data_offsets, the first not above the second");
  }
  entry.begin = offsets[0];
  entry.end = offsets[1];
}

TensorEntry parse_entry(JsonReader& reader, const std::string& name) {
  if (name.size() > kMaxName) {
    refuse("names must have at most " + std::to_string(kMaxName) + " bytes; got " + shown(name));
  }
  TensorEntry entry;
  entry.name = name;
  int found = 0;
  reader.object([&](const std::string& key) {
    if (key == "dtype") {
      entry.dtype = parse_dtype(reader.string(), name);
    } else if (key == "shape") {
      entry.shape = parse_shape(reader, name);
    } else if (key == "data_offsets") {
      parse_span(reader, entry);
    } else {
      refuse("tensor " + shown(name) + " must have dtype, shape and data_offsets only; got " +
             shown(key));
    }
    ++found;
  });
  if (found != 3) {  // keys are distinct, so three of them are all
    refuse("tensor " + shown(name) + " must have dtype, shape and data_offsets; got " +
           std::to_string(found) + " of them");
  }
  return entry;
}

void check_spans(const std::vector<TensorEntry>& tensors, uint64_t data_size) {
  uint64_t at = 0;
  for (const TensorEntry& entry : tensors) {
    if (entry.begin != at) {
      refuse("the data of tensor " + shown(entry.name) + " must begin at byte " +
             std::to_string(at) + ", where that before it ends; got " +
             std::to_string(entry.begin));
    }
    const uint64_t size = checked_size(entry.shape, entry.dtype);
    if (size != entry.size()) {
      refuse("tensor " + shown(entry.name) + " of " + dtype_name(entry.dtype) + " " +
             shape_text(entry.shape) + " must take " + std::to_string(size) + " bytes; got " +
             std::to_string(entry.size()));
    }
    at = entry.end;
  }
  if (at != data_size) {
    refuse("the file must have " + std::to_string(at) + " bytes of data after its header; got " +
           std::to_string(data_size));
  }
}

}  // namespace

const char* dtype_name(Dtype dtype) { return kDtypes.at(static_cast<size_t>(dtype)).name; }

uint64_t dtype_size(Dtype dtype) { return kDtypes.at(static_cast<size_t>(dtype)).size; }

uint64_t header_length(const unsigned char* prefix, uint64_t file_size) {
  if (file_size < 8) {
    refuse("a safetensors file must have at least 8 bytes; got " + std::to_string(file_size));
  }
  uint64_t length = 0;
  std::memcpy(&length, prefix, sizeof(length));
  if (length > kMaxHeader) {
    refuse("the header must have at most " + std::to_string(kMaxHeader) + " bytes; got " +
           std::to_string(length) + ", so this is no safetensors file");
  }
  if (length > file_size - 8) {
    refuse("the header of " + std::to_string(length) + " bytes must lie in the file; got " +
           std::to_string(file_size) + " bytes in all, so the file is cut short");
  }
  return length;
}

Header parse_header(std::string_view json, uint64_t data_size) {
  Header header;
  JsonReader reader(json, "the header", 4);
  reader.object([&](const std::string& key) {
    if (key == "__metadata__") {
      reader.object([&](const std::string& name) { header.metadata[name] = reader.string(); });
      return;
    }
    if (header.tensors.size() == kMaxTensors) {
      refuse("a file must have at most " + std::to_string(kMaxTensors) + " tensors; got more");
    }
    header.tensors.push_back(parse_entry(reader, key));
  });
  reader.finish();
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  check_spans(header.tensors, data_size);
  return header;
}

uint64_t checked_size(const std::vector<int64_t>& shape, Dtype dtype) {
  uint64_t bytes = dtype_size(dtype);
  bool is_empty = false;
  if (shape.size() > kMaxRank) {
    refuse("a tensor must have at most " + std::to_string(kMaxRank) + " dimensions; got " +
           std::to_string(shape.size()));
  }
  for (const int64_t size : shape) {
    const auto factor = static_cast<uint64_t>(std::max<int64_t>(size, 1));
    if (size < 0 || factor > kMaxSize / bytes) {
      refuse("a tensor must have less than 2^63 bytes; got " + shape_text(shape) + " of " +
             dtype_name(dtype));
    }
    bytes *= factor;
    is_empty = is_empty || size == 0;
  }
  return is_empty ? 0 : bytes;
}

void assign_spans_(Header& header) {
  std::sort(header.tensors.begin(), header.tensors.end(), [](const auto& a, const auto& b) {
    const uint64_t size_a = dtype_size(a.dtype);
    const uint64_t size_b = dtype_size(b.dtype);
    return size_a != size_b ? size_a > size_b : a.name < b.name;
  });
  uint64_t at = 0;
  for (TensorEntry& entry : header.tensors) {
    const uint64_t size = checked_size(entry.shape, entry.dtype);
    if (size > kMaxSize - at) refuse("a file must have less than 2^63 bytes; got more");
    entry.begin = at;
    entry.end = at += size;
  }
}

std::string serialize_header(const Header& header) {
  JsonWriter json;
  json.begin_object();
  if (!header.metadata.empty()) {
    json.key("__metadata__").begin_object();
    for (const auto& [key, value] : header.metadata) json.key(key).string(value);
    json.end_object();
  }
  for (const TensorEntry& entry : header.tensors) {
    if (entry.name == "__metadata__") refuse("a tensor must not be named '__metadata__'");
    json.key(entry.name).begin_object().key("dtype").string(dtype_name(entry.dtype));
    json.key("shape").begin_array();
    for (const int64_t size : entry.shape) json.integer(size);
    json.end_array().key("data_offsets").begin_array();
    json.unsigned_integer(entry.begin).unsigned_integer(entry.end).end_array().end_object();
  }
  json.end_object();

  std::string text = json.text();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();
  if (length > kMaxHeader) {
    refuse("the header must have at most " + std::to_string(kMaxHeader) + " bytes; got " +
           std::to_string(length));
  }
  parse_header(text, header.tensors.empty() ? 0 : header.tensors.back().end);
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + text;
}

InputFile::InputFile(const std::string& path) {
  // Without O_NONBLOCK the opening of a named pipe would wait for its writer.
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) refuse_system("the file cannot be opened", errno);
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor_);
    throw FileError("the path must name a regular file");
  }
  size_ = static_cast<uint64_t>(status.st_size);
}

InputFile::~InputFile() { ::close(descriptor_); }

void InputFile::read(void* out, uint64_t size) {
  auto* bytes = static_cast<unsigned char*>(out);
  while (size > 0) {
    const ssize_t got = uninterrupted([&] { return ::read(descriptor_, bytes, size); });
    if (got < 0) refuse_system("the file cannot be read", errno);
    if (got == 0) throw FileError("the file became shorter while it was read");
    bytes += got;
    size -= static_cast<uint64_t>(got);
  }
}

Header read_header(InputFile& file) {
  std::array<unsigned char, 8> prefix{};
  file.read(prefix.data(), std::min<uint64_t>(prefix.size(), file.size()));
  std::string json(header_length(prefix.data(), file.size()), '\0');
  file.read(json.data(), json.size());
  return parse_header(json, file.size() - prefix.size() - json.size());
}

int FileSystem::open(const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); }
int FileSystem::stat(const char* path, struct stat* out) { return ::stat(path, out); }
int FileSystem::fchmod(int descriptor, mode_t mode) { return ::fchmod(descriptor, mode); }
ssize_t FileSystem::pwrite(int descriptor, const void* data, size_t size, off_t offset) {
  return ::pwrite(descriptor, data, size, offset);
}
int FileSystem::fsync(int descriptor) { return ::fsync(descriptor); }
int FileSystem::close(int descriptor) { return ::close(descriptor); }
int FileSystem::rename(const char* from, const char* to) { return ::rename(from, to); }
int FileSystem::unlink(const char* path) { return ::unlink(path); }

FileSystem& real_file_system() {
  static FileSystem system;
  return system;
}

void sync_folder(const std::string& folder, FileSystem& system) {
  const int descriptor = uninterrupted(
      [&] { return system.open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0); });
  const int synced = descriptor < 0 ? -1 : uninterrupted([&] { return system.fsync(descriptor); });
  const int error = errno;
  if (descriptor >= 0) system.close(descriptor);
  // Some network file systems cannot sync a folder (EINVAL): nothing more can be done there.
  if (synced != 0 && error != EINVAL) {
    refuse_system("the file is written but its folder cannot be synced", error);
  }
}

AtomicFile::AtomicFile(const std::string& path, FileSystem& system) : system_(system), path_(path) {
  struct stat status {};
  replaces_ = system_.stat(path_.c_str(), &status) == 0;
  if (!replaces_ && errno != ENOENT) refuse_system("the file cannot be written", errno);
  if (replaces_ && !S_ISREG(status.st_mode)) throw FileError("the path must name a regular file");
  mode_ = status.st_mode & 07777;
  create_temporary();
}

void AtomicFile::create_temporary() {
  const size_t slash = path_.rfind('/');
  const size_t start = slash == std::string::npos ? 0 : slash + 1;
  // A name may have 255 bytes, and the one made of it must not have more.
  const std::string stem = path_.substr(0, start) + "." + path_.substr(start, 200) + ".";
  std::random_device random;
  for (int attempt = 0; attempt < 16; ++attempt) {
    const std::string name = stem + std::to_string(random()) + ".tmp";
    descriptor_ = system_.open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC,
                               replaces_ ? 0600 : 0666);
    if (descriptor_ >= 0) {
      temporary_ = name;
      return;
    }
    if (errno != EEXIST && errno != EINTR) break;
  }
  refuse_system("no file can be made in its folder", errno);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) system_.close(descriptor_);
  if (!temporary_.empty()) system_.unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, uint64_t size) {
  write_at(position_, data, size);
  position_ += size;
}

void AtomicFile::write_at(uint64_t offset, const void* data, uint64_t size) {
  const uint64_t start = offset, whole = size;
  const auto* bytes = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const ssize_t put = uninterrupted(
        [&] { return system_.pwrite(descriptor_, bytes, size, static_cast<off_t>(offset)); });
    if (put <= 0) refuse_system("the file cannot be written", put < 0 ? errno : EIO);
    bytes += put;
    offset += static_cast<uint64_t>(put);
    size -= static_cast<uint64_t>(put);
  }
#ifdef SYNC_FILE_RANGE_WRITE
  // A hint: the disk begins with this range now, and commit's fsync has less to wait for.
  constexpr uint64_t kLarge = 256 * 1024;
  if (whole >= kLarge)
    (void)::sync_file_range(descriptor_, static_cast<off_t>(start), static_cast<off_t>(whole),
                            SYNC_FILE_RANGE_WRITE);
#endif
}

void AtomicFile::commit(bool syncs_folder) {
  const auto check = [](int result) {
    if (result != 0) refuse_system("the file cannot be written", errno);
  };
  if (replaces_) check(uninterrupted([&] { return system_.fchmod(descriptor_, mode_); }));
  check(uninterrupted([&] { return system_.fsync(descriptor_); }));
  const int closed = system_.close(descriptor_);
  descriptor_ = -1;  // closed whatever the answer is, so a close is never repeated
  check(closed != 0 && errno == EINTR ? 0 : closed);
  check(system_.rename(temporary_.c_str(), path_.c_str()));
  temporary_.clear();
  if (!syncs_folder) return;
  const size_t slash = path_.rfind('/');
  sync_folder(slash == std::string::npos ? "." : path_.substr(0, slash + 1), system_);
}

}  // namespace reslora::detail
