// Folders and text files by POSIX calls; see folders.h.
//
// Not by std::filesystem: some releases of torch export a copy of it that differs from the
// compiler's.
#include "io/folders.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "io/factor_names.h"
#include "io/tensor_types.h"
#include "safetensors/safetensors.h"

namespace reslora::detail {

std::string final_path(const std::string& path) {
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = path.find('/', begin);
    const std::string part = path.substr(begin, end - begin);
    const bool is_hidden = part.compare(0, std::strlen(kHidden), kHidden) == 0;
    const bool is_unfinished = !part.empty() && part[0] == '.' && ends_with(part, kUnfinished);
    if (end != std::string::npos && (is_hidden || is_unfinished))
      return path.substr(0, begin) + path.substr(end + 1);
  }
  return path;
}

bool stays_below(const std::string& name) {
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = name.find('/', begin);
    const std::string part = name.substr(begin, end - begin);
    if (part.empty() || part == "." || part == "..") return false;
  }
  return true;
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.find('/') == std::string::npos;
}

std::string in_folder(const std::string& folder, const std::string& name) {
  return folder.empty() ? name : folder + "/" + name;
}

void make_folder(const std::string& path) {
  for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    const int error = ::mkdir(part.c_str(), 0777) == 0 ? 0 : errno;
    TORCH_CHECK_VALUE(
        error != ENOTDIR,
        fmt::format("[save] the place to write must be a folder; got {}, below a file",
                    shown(path, 4096)));
    TORCH_CHECK(error == 0 || error == EEXIST,
                fmt::format("[save] {}: the folder could not be made ({})", shown(part, 4096),
                            std::strerror(error)));
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

void remove_file(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT)
    TORCH_CHECK(false, fmt::format("[save] {}: the file could not be removed ({})",
                                   shown(path, 4096), std::strerror(errno)));
}

}  // namespace reslora::detail
