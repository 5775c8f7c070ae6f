/// @file
/// Writing to disk, all or nothing: a text file, files that belong together, a whole folder.
///
/// @code{.cpp}
/// reslora::Stage stage("adapter");  // files that join this folder
/// reslora::save_tensors(stage.path("extra.safetensors"), {{{"x", x}}, {}});
/// reslora::write_text(stage.path("notes.txt"), "trained on a Tuesday");
/// stage.commit();  // both are there; without it neither is
/// @endcode
///
/// What is written lies in a hidden folder beside its place, on the same disk, and is renamed at
/// the end; a file that takes another's place takes its mode too. A writer that dies leaves its
/// hidden folder; the next one finishes what was decided and removes the rest. Errors: c10::Error
/// where the system refuses, c10::ValueError where the place cannot serve. They name the place
/// where a file will be, not the hidden one.
#pragma once

#include <reslora/export.h>

#include <memory>
#include <string>
#include <vector>

namespace reslora {

namespace detail {
class FolderLock;
}

/// What becomes visible at once; see above.
class RESLORA_API Stage {
 public:
  /// What is staged.
  enum class Kind {
    kFiles,   ///< files that join those of a folder, each in the place of one of its name
    kFolder,  ///< a folder that appears whole; one writer at a time
  };

  /// Begins to write. For files `folder` is made where there is none, with those above it. A whole
  /// folder must not be there, or be empty, when it is committed, and the folder above it must be
  /// there; what an earlier writer left that was killed is removed, and where another is at work,
  /// or a folder of somebody else has the hidden name, c10::ValueError is thrown.
  explicit Stage(const std::string& folder, Kind kind = Kind::kFiles);
  /// Discards what was not committed.
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  /// The folder to write to until `commit`.
  const std::string& place() const { return place_; }
  // What follows throws c10::ValueError once the stage is over.

  /// Where to write the file that will have this name, or this path below the folder (without "."
  /// and ".."). Files are put in place in the order in which their paths were asked for, and the
  /// first decides: where the program dies after it, the next commit to this folder finishes this
  /// one, and where it dies before, nothing has changed. So ask for that file first by which a
  /// reader can tell whether the others belong to it.
  std::string path(const std::string& name);
  /// Lets `commit` remove the file of this name, where there is one (kFiles).
  void remove(const std::string& name);
  /// Puts all in place and syncs it; of several commits to one folder each waits for the one
  /// before. Throws, with nothing moved, where a folder lies under the name of a file. Where the
  /// system refuses once the first file is in place, the others follow in the next commit.
  void commit();
  /// Removes what was not committed, and `folder` where this object made it and nothing is in it.
  void discard();

 private:
  void open_folder();
  void check_open() const;
  void commit_files();

  std::string folder_;
  std::string hidden_;  // empty: there is nothing to discard
  std::string place_;   // in it, or the same
  Kind kind_;
  bool is_new_ = false;
  std::unique_ptr<detail::FolderLock> lock_;  // of the hidden folder
  std::vector<std::string> names_;
  std::vector<std::string> removed_;
};

/// Finishes what writers of files in `folder` had decided and died in, and removes the rest of what
/// they left, as the next `Stage` there would. Does nothing where another process is at work, and
/// where the folder cannot be written.
RESLORA_API void finish_saves(const std::string& folder);

/// Writes a text file atomically, with mode 0666 & ~umask or that of the file it replaces. Throws
/// c10::Error where the system refuses.
RESLORA_API void write_text(const std::string& path, const std::string& text);

}  // namespace reslora
