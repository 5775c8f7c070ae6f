// Writing all or nothing: files that join a folder, whole folders, and what a writer that died
// left.
#include <gmock/gmock.h>
#include <reslora/stage.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "io/in_folder.h"
#include "testing.h"

namespace reslora {
namespace {

using testing::refuses;
using ::testing::UnorderedElementsAre;

class StageTest : public testing::InFolder {
 protected:
  std::string text_of(const std::string& name) const {
    std::ifstream in(path(name));
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  void put(const std::string& name, const std::string& text) const {
    std::ofstream(path(name)) << text;
  }
  std::set<std::string> names(const std::string& below = ".") const {
    std::set<std::string> found;
    for (const auto& item : std::filesystem::directory_iterator(path(below)))
      found.insert(item.path().filename());
    return found;
  }
  bool is_there(const std::string& name) const { return std::filesystem::exists(path(name)); }
};

TEST_F(StageTest, FilesAppearTogether) {
  put("b", "old");
  put("c", "of another");
  Stage stage(folder_);
  write_text(stage.path("a"), "1");
  write_text(stage.path("b"), "2");
  stage.remove("c");
  stage.remove("not there");
  EXPECT_EQ(text_of("b"), "old");
  EXPECT_FALSE(is_there("a"));
  EXPECT_TRUE(is_there("c"));
  stage.commit();
  EXPECT_EQ(text_of("a"), "1");
  EXPECT_EQ(text_of("b"), "2");
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
  EXPECT_TRUE(refuses([&] { stage.commit(); }, "committed once"));
}

TEST_F(StageTest, WhatIsNotCommittedLeavesNothing) {
  put("b", "old");
  {
    Stage stage(folder_), fresh(path("new/deep"));
    write_text(stage.path("b"), "2");
    const std::string below = stage.path("folder");
    std::filesystem::create_directory(below);
    std::ofstream(below + "/a") << "1";
    write_text(fresh.path("a"), "1");
  }
  EXPECT_EQ(text_of("b"), "old");
  EXPECT_THAT(names(), UnorderedElementsAre("b", "new"));
  EXPECT_THAT(names("new"), UnorderedElementsAre());
}

TEST_F(StageTest, NothingIsMovedWhereAFolderIsInTheWay) {
  std::filesystem::create_directory(path("b"));
  put("a", "old");
  {
    Stage stage(folder_);
    write_text(stage.path("a"), "1");
    write_text(stage.path("b"), "2");
    EXPECT_TRUE(refuses([&] { stage.commit(); }, path("b") + "' must be a file to write"));
  }
  {
    Stage stage(folder_);
    write_text(stage.path("a"), "1");
    stage.remove("b");
    EXPECT_TRUE(refuses([&] { stage.commit(); }, path("b") + "' must be a file to write"));
  }
  EXPECT_EQ(text_of("a"), "old");
  EXPECT_THAT(names(), UnorderedElementsAre("a", "b"));
}

TEST_F(StageTest, RefusesAPlaceThatIsAFile) {
  put("file", "");
  EXPECT_TRUE(refuses([&] { Stage stage(path("file")); }, "must be a folder; got the file"));
  EXPECT_TRUE(refuses([&] { Stage stage(path("file/new")); }, "file/new', below a file"));
  EXPECT_THAT(names(), UnorderedElementsAre("file"));
}

TEST_F(StageTest, AWholeFolderAppearsAtOnce) {
  for (const char* name : {"out", "out/"}) {  // the second time the folder is there, and empty
    Stage stage(path(name), Stage::Kind::kFolder);
    EXPECT_EQ(stage.place(), path(".out.unfinished/out"));
    std::filesystem::create_directory(stage.path("below"));
    write_text(stage.path("below/a"), "1");
    stage.commit();
    EXPECT_THAT(names(), UnorderedElementsAre("out"));
    EXPECT_EQ(text_of("out/below/a"), "1");
    std::filesystem::remove_all(path("out/below"));
  }
}

TEST_F(StageTest, AWholeFolderThatIsNotFinishedLeavesWhatWasThere) {
  std::filesystem::create_directory(path("out"));
  put("out/mine", "kept");
  {
    Stage stage(path("out"), Stage::Kind::kFolder);
    write_text(stage.path("a"), "1");
    EXPECT_THROW(stage.commit(), c10::Error) << "it is not empty";
  }
  EXPECT_THAT(names(), UnorderedElementsAre("out"));
  EXPECT_THAT(names("out"), UnorderedElementsAre("mine"));
  EXPECT_THROW(Stage(path("no/out"), Stage::Kind::kFolder), c10::Error);
}

TEST_F(StageTest, OneWriterOfAFolderAtATime) {
  Stage first(path("out"), Stage::Kind::kFolder);
  write_text(first.path("a"), "first");
  EXPECT_TRUE(refuses([&] { Stage second(path("out"), Stage::Kind::kFolder); }, "at a time"));
  EXPECT_EQ(text_of(".out.unfinished/out/a"), "first");
  first.discard();
  EXPECT_THAT(names(), UnorderedElementsAre());
  Stage third(path("out"), Stage::Kind::kFolder);
  EXPECT_THAT(names(".out.unfinished"), UnorderedElementsAre(".writer", "out"));
}

TEST_F(StageTest, ANoteIsBelievedOfFilesInTheFolderAlone) {
  put("precious", "kept");
  std::filesystem::create_directories(path("in/.reslora-abcdef/link"));
  std::filesystem::create_symlink(folder_, path("in/link"));
  const auto note = [&](const std::string& text) {
    std::filesystem::create_directories(path("in/.reslora-abcdef/link"));
    put("in/.reslora-abcdef/link/precious", "theirs");
    put("in/mine", "kept");
    put("in/.reslora-abcdef/.commit", text);
    finish_saves(path("in"));
    EXPECT_EQ(text_of("precious"), "kept") << text;
    EXPECT_FALSE(std::filesystem::exists(path("in/.reslora-abcdef")));
  };
  const std::string end(1, '\0');
  for (const std::string& name :
       {std::string("../precious"), path("precious"), std::string("./../precious"),
        std::string("link/precious"), std::string("mine/../../precious")}) {
    note("-" + name + end);
    note("+none" + end + "-" + name + end);
    note("+none" + end + "+" + name + end);
    EXPECT_EQ(text_of("in/mine"), "kept");
  }
  note("+none" + end + "-mine" + end);
  EXPECT_EQ(text_of("in/mine"), "kept") << "no save removes it";
  std::filesystem::create_directories(path("in/deep"));
  note("+deep" + end);
  std::filesystem::create_directories(path("in/away"));  // a folder here, a link in the hidden one
  std::filesystem::create_directories(path("in/.reslora-abcdef"));
  std::filesystem::create_symlink(folder_, path("in/.reslora-abcdef/away"));
  note("+none" + end + "+away/precious" + end);
  put("in/adapter_statistics.safetensors", "old");
  note("-adapter_statistics.safetensors" + end);
  EXPECT_FALSE(is_there("in/adapter_statistics.safetensors")) << "a writer's note is believed";
}

TEST_F(StageTest, AFolderInThePlaceOfAMarkIsNoMark) {
  for (const char* name : {".writer", ".commit"}) {
    const std::string below = std::string("in/.reslora-abcdef/") + name;
    std::filesystem::create_directories(path(below));
    put(below + "/mine", "kept");
    Stage stage(path("in"));
    write_text(stage.path("a"), "1");
    stage.commit();
    EXPECT_EQ(text_of(below + "/mine"), "kept");
    std::filesystem::remove_all(path("in/.reslora-abcdef"));
  }
}

TEST_F(StageTest, FilesBesideOthersHaveNamesOfTheirOwn) {
  Stage stage(folder_);
  for (const char* name : {"", ".hidden", "below/a", "../a", "/a"})
    EXPECT_TRUE(refuses([&] { stage.path(name); }, "a name of its own")) << name;
}

TEST_F(StageTest, FoldersOfSomebodyElseAreLeftAlone) {
  for (const char* folder : {"in/.reslora-abcdef", ".in.unfinished"}) {
    std::filesystem::create_directories(path(folder));
    put(std::string(folder) + "/mine", "kept");
  }
  finish_saves(path("in"));
  {
    Stage stage(path("in"));
    write_text(stage.path("a"), "1");
    stage.commit();
  }
  EXPECT_EQ(text_of("in/.reslora-abcdef/mine"), "kept");
  EXPECT_TRUE(refuses([&] { Stage stage(path("in"), Stage::Kind::kFolder); }, "must be free"));
  EXPECT_EQ(text_of(".in.unfinished/mine"), "kept");
}

TEST_F(StageTest, LeftoversOfAKilledWriterAreRemovedAndLinksNotFollowed) {
  put("precious", "kept");
  std::filesystem::create_directories(path(".out.unfinished/below"));
  put(".out.unfinished/below/half", "half");
  put(".out.unfinished/.writer", "");
  std::filesystem::create_symlink(folder_, path(".out.unfinished/link"));
  Stage stage(path("out"), Stage::Kind::kFolder);
  EXPECT_THAT(names(".out.unfinished"), UnorderedElementsAre(".writer", "out"));
  EXPECT_EQ(text_of("precious"), "kept");
  stage.discard();
  std::filesystem::create_directory(path("theirs"));
  put("theirs/precious", "kept");
  std::filesystem::create_symlink(path("theirs"), path(".out.unfinished"));
  EXPECT_THROW(Stage(path("out"), Stage::Kind::kFolder), c10::Error);
  EXPECT_EQ(text_of("theirs/precious"), "kept");
}

TEST_F(StageTest, TextsAreWrittenWholeWithTheModeOfTheUmask) {
  const mode_t old = ::umask(027);
  write_text(path("a"), "\xc3\xa9\n");
  ::umask(old);
  struct stat found;
  ASSERT_EQ(::stat(path("a").c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0640U);
  EXPECT_EQ(text_of("a"), "\xc3\xa9\n");
  EXPECT_THROW(write_text(path("no/a"), ""), c10::Error);
  EXPECT_THAT(names(), UnorderedElementsAre("a"));
}

}  // namespace
}  // namespace reslora
