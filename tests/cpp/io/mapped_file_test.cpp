// Files that are written to, or shortened, while they are merged: said, never a crash.
#include <ATen/ATen.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <reslora/adapter_io.h>
#include <reslora/model_files.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <csetjmp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>

#include "io/in_folder.h"
#include "testing.h"

namespace reslora {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

constexpr const char* kSentence = "the file must stay as it is while it is read";

class MappedFileTest : public testing::InFolder {
 protected:
  void SetUp() override {
    InFolder::SetUp();
    save();
  }
  void save() {
    save_tensors(path("in"), {{{"a", at::ones({1500, 1000})}, {"b", at::ones({1500, 1000})}}, {}});
    size_ = fs::file_size(path("in"));
  }
  /// What writing a copy says where `change` happens before it, or at its first progress.
  std::string said(const std::function<void()>& change, bool is_before) {
    save();
    const ModelFiles files({path("in")});
    if (is_before) change();
    WriteOptions options;
    bool is_first = !is_before;
    options.dtype = at::kHalf;  // what is computed with is read by the program
    options.progress = [&](int64_t) {
      if (is_first) change();
      is_first = false;
    };
    std::string sentence;
    try {
      files.write(path("out"), {"a", "b"}, {}, options);
    } catch (const c10::Error& error) {
      sentence = error.what_without_backtrace();
    }
    EXPECT_EQ(fs::exists(path("out")), sentence.empty());
    fs::remove(path("out"));
    return sentence;
  }
  void shorten(uint64_t size) const { fs::resize_file(path("in"), size); }
  void touch() const {
    const auto time = fs::last_write_time(path("in"));
    fs::last_write_time(path("in"), time + std::chrono::seconds(2));
  }

  uint64_t size_ = 0;
};

TEST_F(MappedFileTest, AFileThatIsShortenedMeanwhileIsRefused) {
  for (const bool is_before : {true, false})
    for (const uint64_t size : {uint64_t{0}, uint64_t{5000}, size_ / 2, size_ - 1})
      EXPECT_THAT(said([&] { shorten(size); }, is_before), HasSubstr(kSentence)) << size;
}

TEST_F(MappedFileTest, AFileThatIsWrittenToMeanwhileIsRefused) {
  for (const bool is_before : {true, false})
    EXPECT_THAT(said([&] { touch(); }, is_before), HasSubstr(kSentence));
}

TEST_F(MappedFileTest, AFileThatIsShortenedAndThenRenamedOrRemovedIsRefused) {
  const auto renamed = [&] {
    shorten(5000);
    fs::rename(path("in"), path("other"));
  };
  const auto removed = [&] {
    shorten(5000);
    fs::remove(path("in"));
  };
  for (const bool is_before : {true, false}) {
    EXPECT_THAT(said(renamed, is_before), HasSubstr(kSentence));
    EXPECT_THAT(said(removed, is_before), HasSubstr(kSentence));
  }
}

TEST_F(MappedFileTest, AHandlerThatCameLaterDoesNotEndTheProgram) {
  const auto in_a_process_of_its_own = [&] {
    said([] {}, true);  // a map: the handler is there
    struct sigaction other = {};
    other.sa_handler = [](int) { std::_Exit(9); };
    ::sigaction(SIGBUS, &other, nullptr);
    const std::string sentence = said([&] { shorten(5000); }, true);
    std::_Exit(sentence.find(kSentence) == std::string::npos ? 1 : 0);
  };
  // A fork would keep the locks of OpenMP's threads without the threads, and wait for ever.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(in_a_process_of_its_own(), ::testing::ExitedWithCode(0), "");
}

TEST_F(MappedFileTest, AFileThatIsReplacedOrRemovedIsReadAsItWas) {
  const auto replace = [&] {
    save_tensors(path("new"), {{{"a", at::zeros({2})}}, {}});
    fs::rename(path("new"), path("in"));
  };
  EXPECT_EQ(said(replace, true), "");
  EXPECT_EQ(said([&] { fs::remove(path("in")); }, true), "");
  EXPECT_EQ(said([] {}, true), "");
}

TEST_F(MappedFileTest, WhatIsReadOfAViewCanBeChecked) {
  const ModelFiles files({path("in")});
  const at::Tensor view = files.tensor("b");
  files.check_unchanged();
  shorten(5000);
  EXPECT_EQ(view.sum().item<double>(), 0);
  EXPECT_EQ(view.sum().item<double>(), 0);
  EXPECT_THROW(files.check_unchanged(), c10::Error);
}

TEST_F(MappedFileTest, AFileThatWasCutIsToldAlsoWhereItIsGone) {
  std::vector<ModelFiles> many;  // more than descriptors are kept of
  for (int i = 0; i < 300; ++i) many.push_back(ModelFiles({path("in")}));
  const at::Tensor view = many.back().tensor("b");
  shorten(5000);
  fs::rename(path("in"), path("elsewhere"));
  EXPECT_EQ(view.sum().item<double>(), 0);
  EXPECT_THROW(many.back().check_unchanged(), c10::Error);
}

/// Of a file that is no map of ours and was cut: what the program sees there.
class Cut {
 public:
  explicit Cut(const std::string& path) {
    std::ofstream(path) << std::string(8192, 'x');
    const int descriptor = ::open(path.c_str(), O_RDONLY);
    page_ = static_cast<char*>(::mmap(nullptr, 8192, PROT_READ, MAP_SHARED, descriptor, 0));
    ::close(descriptor);
    fs::resize_file(path, 0);
  }
  void read() const { (void)*const_cast<const volatile char*>(page_); }

 private:
  char* page_;
};

sigjmp_buf back;

TEST_F(MappedFileTest, AHandlerThatWasThereBeforeIsCalledAgainAndAgain) {
  const auto in_a_process_of_its_own = [&] {
    struct sigaction other = {};
    other.sa_handler = [](int) { siglongjmp(back, 1); };
    ::sigaction(SIGBUS, &other, nullptr);
    const Cut cut(path("cut"));
    static int caught = 0;  // a jump leaves what lies on the stack undefined
    while (caught < 3) {
      const ModelFiles files({path("in")});  // a map: the handler is there
      if (sigsetjmp(back, 1) == 0) {
        cut.read();
        std::_Exit(1);
      }
      ++caught;
    }
    std::_Exit(0);
  };
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(in_a_process_of_its_own(), ::testing::ExitedWithCode(0), "");
}

TEST_F(MappedFileTest, AHandlerThatMendsNothingDoesNotLetTheProgramHang) {
  const auto in_a_process_of_its_own = [&] {
    struct sigaction other = {};
    other.sa_handler = [](int) {};
    ::sigaction(SIGBUS, &other, nullptr);
    const ModelFiles files({path("in")});
    ::raise(SIGBUS);  // sent: the handler is all that is called
    ::raise(SIGBUS);
    Cut(path("cut")).read();
    std::_Exit(0);
  };
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(in_a_process_of_its_own(), ::testing::KilledBySignal(SIGBUS), "");
}

TEST_F(MappedFileTest, OtherSignalsOfTheKindEndTheProgram) {
  const ModelFiles files({path("in")});
  EXPECT_EXIT(::raise(SIGBUS), ::testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace reslora
