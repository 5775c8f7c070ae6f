// Folders and text files: how they are made, read and removed.
//
// Writing is in reslora/stage.h.
#pragma once

#include <string>

namespace reslora::detail {

/// What the hidden folders of a stage are called: `.reslora-XXXXXX` in the folder whose files are
/// written, `.NAME.unfinished` beside the folder NAME that will appear.
constexpr const char* kHidden = ".reslora-";
constexpr const char* kUnfinished = ".unfinished";

/// The path that a file of a stage will have; any other path is returned as it is.
std::string final_path(const std::string& path);

/// True for a path that stays below the folder it is taken in: without empty parts, "." and "..".
bool stays_below(const std::string& name);

/// True for the name of a file that is not hidden, in no other folder.
bool is_plain_name(const std::string& name);

/// The path of a file in a folder; an empty one is the folder that the program runs in.
std::string in_folder(const std::string& folder, const std::string& name);

/// Makes a folder and those above it, where they are not there. Throws c10::ValueError where a file
/// lies in the way, c10::Error where the system refuses.
void make_folder(const std::string& path);

/// True for a regular file.
bool is_file(const std::string& path);

/// True for a file, a folder or anything else of that name.
bool exists(const std::string& path);

/// The text of a file; empty where there is none. Throws c10::Error where the system refuses.
std::string file_text(const std::string& path);

/// Removes a file where there is one.
void remove_file(const std::string& path);

}  // namespace reslora::detail
