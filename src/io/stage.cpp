// Files and folders that become visible at once, by POSIX calls; see reslora/stage.h.
#include <fcntl.h>
#include <ftw.h>
#include <reslora/stage.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "io/folders.h"
#include "io/tensor_types.h"
#include "io/unfinished.h"
#include "safetensors/safetensors.h"

namespace reslora {
namespace {

using detail::FolderLock;
using detail::refuse_system;
using detail::shown;

/// Demands a path that stays below a folder that is written whole; of files in one that others
/// write to, too, a name that no hidden file has.
void check_name(const std::string& name, bool is_whole) {
  TORCH_CHECK_VALUE(
      is_whole ? detail::stays_below(name) : detail::is_plain_name(name),
      fmt::format("[save] a file must have a name of its own in the folder; got '{}'", name));
}

/// Gives a file the mode of the one that it will replace, where there is one.
void keep_mode(const std::string& replaced, const std::string& written) {
  struct stat found;
  if (::stat(replaced.c_str(), &found) != 0) return;
  if (::chmod(written.c_str(), found.st_mode & 07777) != 0)
    refuse_system(replaced, "its mode could not be kept", errno);
}

/// Syncs all that lies in a folder, and the folder. Not 0: errno says why.
int sync_below(const std::string& folder) {
  const auto sync = [](const char* path, const struct stat*, int type, struct FTW*) {
    if (type != FTW_F && type != FTW_DP) return 0;
    const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) return -1;
    const int result = ::fsync(descriptor);
    ::close(descriptor);
    return result;
  };
  return ::nftw(folder.c_str(), sync, 16, FTW_DEPTH | FTW_PHYS);
}

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

}  // namespace

Stage::Stage(const std::string& folder, Kind kind)
    : folder_(folder.empty() ? "." : folder), kind_(kind), lock_(std::make_unique<FolderLock>()) {
  while (folder_.size() > 1 && folder_.back() == '/') folder_.pop_back();
  if (kind_ == Kind::kFolder) {
    open_folder();
    return;
  }
  is_new_ = !detail::exists(folder_);
  detail::make_folder(folder_);
  place_ = hidden_ = detail::make_hidden(folder_, *lock_);
}

void Stage::open_folder() {
  const std::string parent = parent_of(folder_), name = folder_.substr(folder_.rfind('/') + 1);
  const std::string hidden = parent + "." + name + detail::kUnfinished;
  if (::mkdir(hidden.c_str(), 0777) != 0 && errno != EEXIST)
    refuse_system(hidden, "the folder could not be made", errno);
  struct stat found;
  if (::lstat(hidden.c_str(), &found) == 0 && !S_ISDIR(found.st_mode))
    refuse_system(hidden, "the folder could not be opened", ENOTDIR);
  *lock_ = FolderLock(hidden, FolderLock::Kind::kTry);
  TORCH_CHECK_VALUE(
      lock_->is_held(),
      fmt::format("[merge] one merge may write {} at a time; got another", shown(folder_, 4096)));
  TORCH_CHECK_VALUE(
      detail::is_of_writer(hidden),
      fmt::format("[merge] {} must be free for what is not finished; got a folder of somebody "
                  "else: move it",
                  shown(hidden, 4096)));
  if (detail::remove_below(hidden) != 0)
    refuse_system(hidden, "what an earlier merge left could not be removed", errno);
  hidden_ = hidden;
  detail::mark(hidden);
  place_ = hidden + "/" + name;
  detail::make_folder(place_);
}

Stage::~Stage() { discard(); }

std::string Stage::path(const std::string& name) {
  check_open();
  check_name(name, kind_ == Kind::kFolder);
  names_.push_back(name);
  return place_ + "/" + name;
}

void Stage::remove(const std::string& name) {
  check_open();
  check_name(name, kind_ == Kind::kFolder);
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
  if (sync_below(place_) != 0) refuse_system(folder_, "its files could not be synced", errno);
  if (::rename(place_.c_str(), folder_.c_str()) != 0)
    refuse_system(folder_, "the folder could not be put in place", errno);
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
    if (!detail::exists(hidden_ + "/" + name))
      refuse_system(folder_ + "/" + name, "the file could not be written", ENOENT);
    keep_mode(folder_ + "/" + name, hidden_ + "/" + name);
  }
  const detail::Commit commit = {names_, removed_};
  detail::on_file("save", folder_, [&] { detail::note_commit(hidden_, commit); });
  const FolderLock lock(folder_, FolderLock::Kind::kWait);
  detail::finish_dead(folder_);
  try {
    detail::put_in_place(folder_, hidden_, commit);
  } catch (...) {
    // Once the first file is there, the rest stays where a reader and the next writer find it.
    if (detail::is_decided(hidden_, commit)) hidden_.clear();
    throw;
  }
  is_new_ = false;
}

void Stage::discard() {
  if (!hidden_.empty()) {
    detail::remove_below(hidden_);
    ::rmdir(hidden_.c_str());
    if (is_new_) ::rmdir(folder_.c_str());  // stays where something is in it
    hidden_.clear();
  }
  lock_->release();
}

void finish_saves(const std::string& folder) { detail::finish_dead_if_possible(folder); }

void write_text(const std::string& path, const std::string& text) {
  detail::on_file("save", path, [&] {
    detail::AtomicFile file(path);
    file.write(text.data(), text.size());
    file.commit(/*syncs_folder=*/!detail::is_staged(path));
  });
}

}  // namespace reslora
