// Commits that a writer died in, by POSIX calls; see unfinished.h.
#include "io/unfinished.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <reslora/adapter_folder.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>

#include "io/folders.h"
#include "io/tensor_types.h"
#include "safetensors/safetensors.h"

namespace reslora::detail {
namespace {

constexpr const char* kNote = ".commit";
constexpr const char* kMark = ".writer";
constexpr char kPut = '+', kRemove = '-';
constexpr int kAttempts = 16;

/// True where the open folder still has this path, which another process may have removed.
bool is_at(int descriptor, const std::string& path) {
  struct stat own, there;
  return ::fstat(descriptor, &own) == 0 && ::stat(path.c_str(), &there) == 0 &&
         own.st_dev == there.st_dev && own.st_ino == there.st_ino;
}

void sync(const std::string& folder) {
  on_file("save", folder, [&] { sync_folder(folder); });
}

bool is_folder(const std::string& path) {
  struct stat found;
  return ::lstat(path.c_str(), &found) == 0 && S_ISDIR(found.st_mode);
}

/// True where a path is that of a file, or nothing is there.
bool is_file_or_absent(const std::string& path) {
  struct stat found;
  return ::lstat(path.c_str(), &found) != 0 ? errno == ENOENT : S_ISREG(found.st_mode);
}

/// True where a note may name this: it may have come with somebody's adapter. What is put in place
/// must be a file, in the place of a file, and what is removed one of those that saves remove.
bool may_name(const std::string& folder, const std::string& hidden, const std::string& name,
              bool is_removed) {
  if (!is_plain_name(name) || is_folder(in_folder(folder, name))) return false;
  return is_removed ? name == kStatisticsName : is_file_or_absent(in_folder(hidden, name));
}

/// The hidden folders of writers in a folder; links that are called so are not.
std::vector<std::string> hidden_in(const std::string& folder) {
  std::vector<std::string> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(folder.c_str()), ::closedir);
  if (!open) return found;
  while (const dirent* item = ::readdir(open.get()))
    if (std::strncmp(item->d_name, kHidden, std::strlen(kHidden)) == 0) {
      const std::string hidden = in_folder(folder, item->d_name);
      if (is_folder(hidden) && is_of_writer(hidden)) found.push_back(hidden);
    }
  return found;
}

/// What a hidden folder's commit does to `folder`; nothing where it was not reached.
Commit noted_commit(const std::string& folder, const std::string& hidden) {
  Commit commit;
  const std::string text = file_text(in_folder(hidden, kNote));
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end + 1) {
    end = text.find('\0', begin);
    if (end == std::string::npos || end == begin) break;
    const bool is_removed = text[begin] != kPut;
    const std::string name = text.substr(begin + 1, end - begin - 1);
    if (may_name(folder, hidden, name, is_removed)) {
      (is_removed ? commit.removed : commit.names).push_back(name);
    } else if (!is_removed) {
      return {};
    }
  }
  return commit;
}

}  // namespace

void refuse_system(const std::string& path, const char* what, int error) {
  TORCH_CHECK(false,
              fmt::format("[save] {}: {} ({})", shown(path, 4096), what, std::strerror(error)));
}

int remove_below(const std::string& folder) {
  const auto remove = [](const char* path, const struct stat*, int, struct FTW* at) {
    const bool is_mark = at->level == 1 && std::strcmp(path + at->base, kMark) == 0;
    return at->level > 0 && !is_mark ? std::remove(path) : 0;
  };
  // First: a file that went before it would look as if it were in its place already.
  ::unlink(in_folder(folder, kNote).c_str());
  const int result = ::nftw(folder.c_str(), remove, 16, FTW_DEPTH | FTW_PHYS);
  // Last, so that what is left by a writer who dies here is still known to be one's.
  if (result == 0) ::unlink(in_folder(folder, kMark).c_str());
  return result;
}

// ---- Locks --------------------------------------------------------------------------------------

FolderLock::FolderLock(const std::string& folder, Kind kind) {
  descriptor_ = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor_ < 0) return;
  const int how = LOCK_EX | (kind == Kind::kTry ? LOCK_NB : 0);
  int result = 0;
  do {
    result = ::flock(descriptor_, how);
  } while (result != 0 && errno == EINTR);
  is_certain_ = result == 0;
  const bool is_anothers = result != 0 && errno == EWOULDBLOCK;
  if (is_anothers || !is_at(descriptor_, folder)) release();
}

FolderLock::~FolderLock() { release(); }

FolderLock::FolderLock(FolderLock&& other) noexcept { *this = std::move(other); }

FolderLock& FolderLock::operator=(FolderLock&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(is_certain_, other.is_certain_);
  return *this;
}

void FolderLock::release() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
  is_certain_ = false;
}

std::string make_hidden(const std::string& folder, FolderLock& lock) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::string hidden = in_folder(folder, kHidden) + "XXXXXX";
    if (::mkdtemp(hidden.data()) == nullptr)
      refuse_system(folder, "no file can be made there", errno);
    lock = FolderLock(hidden, FolderLock::Kind::kTry);
    if (!lock.is_held()) continue;  // somebody took it for a dead one
    mark(hidden);
    return hidden;
  }
  refuse_system(folder, "no file can be made there", EAGAIN);
}

void mark(const std::string& hidden) {
  const std::string path = in_folder(hidden, kMark);
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor < 0) refuse_system(hidden, "no file can be made there", errno);
  ::close(descriptor);
}

bool is_of_writer(const std::string& hidden) {
  for (const char* own : {kMark, kNote}) {
    const std::string path = in_folder(hidden, own);
    if (exists(path)) return is_file_or_absent(path);
  }
  const std::unique_ptr<DIR, int (*)(DIR*)> open(::opendir(hidden.c_str()), ::closedir);
  if (!open) return false;
  int items = 0;  // "." and ".." among them
  while (::readdir(open.get()) != nullptr) ++items;
  return items <= 2;
}

// ---- Commits ------------------------------------------------------------------------------------

bool is_staged(const std::string& path) {
  const size_t end = path.rfind('/');
  if (end == std::string::npos || end == 0) return false;
  const size_t begin = path.rfind('/', end - 1) + 1;  // 0 where there is none
  return path.compare(begin, std::strlen(kHidden), kHidden) == 0;
}

void note_commit(const std::string& hidden, const Commit& commit) {
  sync_folder(hidden);  // a note that outlasts a crash names files that do
  std::string text;
  for (const std::string& name : commit.names) text += kPut + name + '\0';
  for (const std::string& name : commit.removed) text += kRemove + name + '\0';
  AtomicFile file(in_folder(hidden, kNote));
  file.write(text.data(), text.size());
  file.commit();
}

bool is_decided(const std::string& hidden, const Commit& commit) {
  return commit.names.empty() || !exists(in_folder(hidden, commit.names.front()));
}

void put_in_place(const std::string& folder, const std::string& hidden, const Commit& commit) {
  for (const std::string& name : commit.names) {
    const std::string target = in_folder(folder, name), written = in_folder(hidden, name);
    if (::rename(written.c_str(), target.c_str()) != 0 && errno != ENOENT)
      refuse_system(target, "the file could not be written", errno);
    if (&name == &commit.names.front()) sync(folder);
  }
  for (const std::string& name : commit.removed) remove_file(in_folder(folder, name));
  sync(folder);
}

void finish_dead(const std::string& folder) {
  for (const std::string& hidden : hidden_in(folder)) {
    const FolderLock lock(hidden, FolderLock::Kind::kTry);
    if (!lock.is_held() || !lock.is_certain()) continue;
    const Commit commit = noted_commit(folder, hidden);
    const bool is_noted = !commit.names.empty() || !commit.removed.empty();
    if (is_noted && is_decided(hidden, commit)) put_in_place(folder, hidden, commit);
    if (remove_below(hidden) != 0 || ::rmdir(hidden.c_str()) != 0)
      refuse_system(hidden, "what an earlier save left could not be removed", errno);
  }
}

void finish_dead_if_possible(const std::string& folder) noexcept {
  try {
    if (hidden_in(folder).empty()) return;
    const FolderLock lock(folder, FolderLock::Kind::kTry);
    if (lock.is_held() && lock.is_certain()) finish_dead(folder);
  } catch (const std::exception&) {  // read-only: a reader finds what it needs where it is
  }
}

std::vector<std::string> places_of(const std::string& folder, const std::string& name) {
  std::vector<std::string> places = {in_folder(folder, name)};
  for (const std::string& hidden : hidden_in(folder.empty() ? "." : folder))
    places.push_back(in_folder(hidden, name));
  return places;
}

}  // namespace reslora::detail
