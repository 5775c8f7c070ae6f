// Files and folders that become visible at once, by POSIX calls; see reslora/stage.h.
#include <fcntl.h>
#include <ftw.h>
#include <reslora/stage.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "io/folders.h"
#include "io/tensor_types.h"
#include "safetensors/safetensors.h"

namespace reslora {
namespace {

using detail::shown;

/// Tells what the system refused, with its reason.
[[noreturn]] void refuse(const std::string& path, const char* what, int error) {
  TORCH_CHECK(false,
              fmt::format("[save] {}: {} ({})", shown(path, 4096), what, std::strerror(error)));
}

/// Removes all that lies in a folder; links are removed, not followed. Not 0: errno says why.
int remove_below(const std::string& folder) {
  const auto remove = [](const char* path, const struct stat*, int, struct FTW* at) {
    return at->level > 0 ? std::remove(path) : 0;
  };
  return ::nftw(folder.c_str(), remove, 16, FTW_DEPTH | FTW_PHYS);
}

/// True where the open folder still has this path, which its earlier writer may have renamed.
bool is_at(int descriptor, const std::string& path) {
  struct stat own, there;
  return ::fstat(descriptor, &own) == 0 && ::lstat(path.c_str(), &there) == 0 &&
         own.st_dev == there.st_dev && own.st_ino == there.st_ino;
}

/// Demands a path that stays below the folder.
void check_name(const std::string& name) {
  for (size_t begin = 0, end = 0; end != std::string::npos; begin = end + 1) {
    end = name.find('/', begin);
    const std::string part = name.substr(begin, end - begin);
    TORCH_CHECK_VALUE(
        !part.empty() && part != "." && part != "..",
        fmt::format("[save] a file must have a name of its own in the folder; got '{}'", name));
  }
}

/// Gives a file the mode of the one that it will replace, where there is one.
void keep_mode(const std::string& replaced, const std::string& written) {
  struct stat found;
  if (::stat(replaced.c_str(), &found) != 0) return;
  if (::chmod(written.c_str(), found.st_mode & 07777) != 0)
    refuse(replaced, "its mode could not be kept", errno);
}

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

}  // namespace

Stage::Stage(const std::string& folder, Kind kind)
    : folder_(folder.empty() ? "." : folder), kind_(kind) {
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  if (kind_ == Kind::kFolder) {
    open_folder();
    return;
  }
  is_new_ = !detail::exists(folder_);
  detail::make_folder(folder_);
  std::string hidden = folder_ + "/" + detail::kHidden + "XXXXXX";
  if (::mkdtemp(hidden.data()) == nullptr) refuse(folder_, "no file can be made there", errno);
  hidden_ = hidden;
}

void Stage::open_folder() {
  const std::string parent = parent_of(folder_);
  const std::string hidden =
      parent + "." + folder_.substr(folder_.rfind('/') + 1) + detail::kUnfinished;
  if (::mkdir(hidden.c_str(), 0777) != 0 && errno != EEXIST)
    refuse(hidden, "the folder could not be made", errno);
  lock_ = ::open(hidden.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (lock_ < 0) refuse(hidden, "the folder could not be opened", errno);
  const bool is_locked = ::flock(lock_, LOCK_EX | LOCK_NB) == 0;
  const int error = is_locked ? 0 : errno;
  if (!is_locked || !is_at(lock_, hidden)) {
    ::close(lock_);
    if (error != 0 && error != EWOULDBLOCK) refuse(hidden, "the folder could not be locked", error);
    TORCH_CHECK_VALUE(false, fmt::format("[merge] one merge may write {} at a time; got another",
                                         shown(folder_, 4096)));
  }
  if (remove_below(hidden) != 0) {
    const int reason = errno;
    ::close(lock_);
    refuse(hidden, "what an earlier merge left could not be removed", reason);
  }
  hidden_ = hidden;
}

Stage::~Stage() { discard(); }

std::string Stage::path(const std::string& name) {
  check_open();
  check_name(name);
  names_.push_back(name);
  return hidden_ + "/" + name;
}

void Stage::remove(const std::string& name) {
  check_open();
  check_name(name);
  removed_.push_back(name);
}

void Stage::check_open() const {
  TORCH_CHECK_VALUE(!hidden_.empty(), "[save] a stage is committed once; got one that is over");
}

void Stage::commit() {
  check_open();
  if (kind_ == Kind::kFiles) {
    commit_files();
    discard();
    return;
  }
  detail::on_file("save", folder_, [&] { detail::sync_folder(hidden_); });
  if (::rename(hidden_.c_str(), folder_.c_str()) != 0)
    refuse(folder_, "the folder could not be put in place", errno);
  hidden_.clear();
  discard();
  detail::on_file("save", folder_, [&] { detail::sync_folder(parent_of(folder_)); });
}

void Stage::commit_files() {
  for (const std::vector<std::string>* names : {&names_, &removed_})
    for (const std::string& name : *names)
      TORCH_CHECK_VALUE(
          !detail::exists(folder_ + "/" + name) || detail::is_file(folder_ + "/" + name),
          fmt::format("[save] {} must be a file to write; got something else there",
                      shown(folder_ + "/" + name, 4096)));
  for (const std::string& name : names_) {
    const std::string target = folder_ + "/" + name, written = hidden_ + "/" + name;
    keep_mode(target, written);
    if (::rename(written.c_str(), target.c_str()) != 0)
      refuse(target, "the file could not be written", errno);
  }
  for (const std::string& name : removed_) detail::remove_file(folder_ + "/" + name);
  is_new_ = false;
  detail::on_file("save", folder_, [&] { detail::sync_folder(folder_); });
}

void Stage::discard() {
  if (!hidden_.empty()) {
    remove_below(hidden_);
    ::rmdir(hidden_.c_str());
    if (is_new_) ::rmdir(folder_.c_str());  // stays where something is in it
    hidden_.clear();
  }
  if (lock_ >= 0) ::close(lock_);
  lock_ = -1;
}

void write_text(const std::string& path, const std::string& text) {
  detail::on_file("save", path, [&] {
    detail::AtomicFile file(path);
    file.write(text.data(), text.size());
    file.commit();
  });
}

}  // namespace reslora
