// Folders and text files by POSIX calls, and files that are put in place together; see folders.h.
//
// Not by std::filesystem: some releases of torch export a copy of it that differs from the
// compiler's.
#include "io/folders.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "io/tensor_types.h"
#include "safetensors/safetensors.h"

namespace reslora::detail {

void make_folder(const std::string& path) {
  for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    if (::mkdir(part.c_str(), 0777) != 0 && errno != EEXIST)
      TORCH_CHECK(false, fmt::format("[save] {}: the folder could not be made ({})",
                                     shown(part, 4096), std::strerror(errno)));
    if (end == std::string::npos) break;
  }
  struct stat found;
  TORCH_CHECK_VALUE(::stat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode),
                    fmt::format("[save] the place to write must be a folder; got the file {}",
                                shown(path, 4096)));
}

bool is_file(const std::string& path) {
  struct stat found;
  return ::stat(path.c_str(), &found) == 0 && S_ISREG(found.st_mode);
}

bool exists(const std::string& path) {
  struct stat found;
  return ::lstat(path.c_str(), &found) == 0;
}

std::string file_text(const std::string& path) {
  if (!is_file(path)) return "";
  return on_file("read", path, [&] {
    InputFile file(path);
    std::string text(file.size(), '\0');
    file.read(text.data(), text.size());
    return text;
  });
}

void write_text(const std::string& path, const std::string& text) {
  on_file("save", path, [&] {
    AtomicFile file(path);
    file.write(text.data(), text.size());
    file.commit();
  });
}

void remove_file(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT)
    TORCH_CHECK(false, fmt::format("[save] {}: the file could not be removed ({})",
                                   shown(path, 4096), std::strerror(errno)));
}

Stage::Stage(std::string folder) : folder_(std::move(folder)), is_new_(!exists(folder_)) {
  make_folder(folder_);
  hidden_ = folder_ + "/.reslora-XXXXXX";
  TORCH_CHECK(::mkdtemp(hidden_.data()) != nullptr,
              fmt::format("[save] {}: no file can be made there ({})", shown(folder_, 4096),
                          std::strerror(errno)));
}

Stage::~Stage() {
  for (const std::string& name : names_) ::unlink((hidden_ + "/" + name).c_str());
  ::rmdir(hidden_.c_str());
  if (is_new_) ::rmdir(folder_.c_str());  // stays where something is in it
}

std::string Stage::path(const std::string& name) {
  names_.push_back(name);
  return hidden_ + "/" + name;
}

void Stage::commit() {
  for (const std::string& name : names_)
    TORCH_CHECK_VALUE(!exists(folder_ + "/" + name) || is_file(folder_ + "/" + name),
                      fmt::format("[save] {}/{} must be a file to write; got something else there",
                                  shown(folder_, 4096), name));
  for (const std::string& name : names_) {
    const std::string target = folder_ + "/" + name;
    TORCH_CHECK(::rename((hidden_ + "/" + name).c_str(), target.c_str()) == 0,
                fmt::format("[save] {}: the file could not be written ({})", shown(target, 4096),
                            std::strerror(errno)));
  }
}

}  // namespace reslora::detail
