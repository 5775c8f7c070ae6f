// Folders and text files of adapters: their names, and how they are made, read and written.
#pragma once

#include <string>
#include <vector>

namespace reslora::detail {

constexpr const char* kConfigName = "adapter_config.json";
constexpr const char* kWeightsName = "adapter_model.safetensors";
constexpr const char* kStatisticsName = "adapter_statistics.safetensors";

/// Makes a folder and those above it, where they are not there. Throws c10::Error where the system
/// refuses or a file lies in the way.
void make_folder(const std::string& path);

/// True for a regular file.
bool is_file(const std::string& path);

/// True for a file, a folder or anything else of that name.
bool exists(const std::string& path);

/// The text of a file; empty where there is none. Throws c10::Error where the system refuses.
std::string file_text(const std::string& path);

/// Writes a text file atomically. Throws c10::Error where the system refuses.
void write_text(const std::string& path, const std::string& text);

/// Removes a file where there is one.
void remove_file(const std::string& path);

/// Files that belong together: written to a folder beside their place, then moved there one after
/// the other. What was not moved is removed.
class Stage {
 public:
  /// Makes `folder`, and the hidden one in it. Both are removed where nothing was committed, and
  /// `folder` was not there before.
  explicit Stage(std::string folder);
  ~Stage();
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  /// Where to write the file that will have this name.
  std::string path(const std::string& name);
  /// Moves the files to their places. Throws c10::Error, with nothing moved, where a folder lies
  /// under one of their names.
  void commit();

 private:
  std::string folder_;
  std::string hidden_;
  bool is_new_ = false;
  std::vector<std::string> names_;
};

}  // namespace reslora::detail
