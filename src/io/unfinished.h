// Files that take their places together: what notes that they will, and how it is finished where
// the writer dies on the way.
//
// A writer keeps its files in a hidden folder, which it holds locked, and notes there what its
// commit will do. The first file decides: once it is in its place the rest belongs there too, and
// whoever comes next puts it there. Until then a reader finds it in the hidden folder
// (`places_of`).
#pragma once

#include <string>
#include <vector>

namespace reslora::detail {

/// What a commit does.
struct Commit {
  std::vector<std::string> names;    // files that take their places, in this order
  std::vector<std::string> removed;  // files that go, after that
};

/// A folder that this process has open and locked, as far as its file system has locks. Another
/// process, or another object, waits or is told.
class FolderLock {
 public:
  enum class Kind { kWait, kTry };

  FolderLock() = default;
  FolderLock(const std::string& folder, Kind kind);
  ~FolderLock();
  FolderLock(FolderLock&& other) noexcept;
  FolderLock& operator=(FolderLock&& other) noexcept;

  /// True where nobody else holds the folder, as far as can be known.
  bool is_held() const { return descriptor_ >= 0; }
  /// True where the file system has locks, so that `is_held` is certain.
  bool is_certain() const { return is_certain_; }
  void release();

 private:
  int descriptor_ = -1;
  bool is_certain_ = false;
};

/// Makes a hidden folder in `folder` for a writer, locks and marks it. Throws c10::Error.
std::string make_hidden(const std::string& folder, FolderLock& lock);

/// Marks a hidden folder as one that may be emptied. Throws c10::Error.
void mark(const std::string& hidden);

/// True for a folder that a writer marked, or with nothing in it: not one of somebody else.
bool is_of_writer(const std::string& hidden);

/// True for a file that lies in a writer's hidden folder itself, which `note_commit` syncs.
bool is_staged(const std::string& path);

/// Syncs the hidden folder, then notes in it what its commit will do. Throws FileError.
void note_commit(const std::string& hidden, const Commit& commit);

/// True where the first file of a commit is in its place, or there is none to decide.
bool is_decided(const std::string& hidden, const Commit& commit);

/// Puts files in their places and removes those that go; what was done before is skipped. Throws
/// c10::Error, and can then be called again.
void put_in_place(const std::string& folder, const std::string& hidden, const Commit& commit);

/// Finishes what writers that died had decided, and removes the rest of what they left. Throws
/// c10::Error where the system refuses. Call it with the lock of the folder.
void finish_dead(const std::string& folder);

/// As `finish_dead`, for a reader: does nothing where another process is at work or where the
/// folder cannot be written, and does not throw.
void finish_dead_if_possible(const std::string& folder) noexcept;

/// Where a file of this name may be: in the folder, and in what writers have not finished.
std::vector<std::string> places_of(const std::string& folder, const std::string& name);

/// Removes all that lies in a folder; links are removed, not followed. Not 0: errno says why.
int remove_below(const std::string& folder);

/// Tells what the system refused, with its reason.
[[noreturn]] void refuse_system(const std::string& path, const char* what, int error);

}  // namespace reslora::detail
