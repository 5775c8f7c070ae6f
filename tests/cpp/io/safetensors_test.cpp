// The container without torch: JSON, header rules, SHA-256, and atomic writing under faults.
#include "safetensors/safetensors.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>

#include "io/in_folder.h"
#include "safetensors/json.h"
#include "safetensors/sha256.h"

namespace {

using namespace reslora::detail;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Runs `body` and returns the sentence that it throws, "" where it throws none.
template <typename Error, typename Body>
std::string error_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

std::string json_error(const std::string& text) {
  return error_of<ContentError>([&] {
    JsonReader reader(text, "the text");
    reader.skip();
    reader.finish();
  });
}

std::string json_string(const std::string& text) { return JsonReader(text, "the text").string(); }

TEST(Json, ReadsWhatIsValid) {
  for (const char* text : {"{}", " { } ", "[]", "[1,2.5,-0,1e3,-1.5E-7]", "\"\"", "true", "null",
                           "{\"a\":{\"b\":[false]}}", "\t\r\n0 ", "\"\xc3\xa9\xe2\x82\xac\""}) {
    EXPECT_EQ(json_error(text), "") << text;
  }
}

TEST(Json, RefusesWhatIsNotValid) {
  for (const char* text : {"",
                           "{",
                           "[",
                           "}",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":1,}",
                           "{,}",
                           "[1,]",
                           "[1 2]",
                           "{1:2}",
                           "01",
                           "-",
                           "+1",
                           "1.",
                           ".5",
                           "1e",
                           "1e+",
                           "0x1",
                           "NaN",
                           "Infinity",
                           "tru",
                           "nulL",
                           "'a'",
                           "\"",
                           "\"a",
                           "\"\\",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\u12g4\"",
                           "\"\\u-123\"",
                           "\"a\nb\"",
                           "1 1",
                           "{} {}",
                           "1e999",
                           "{\"a\":1,\"a\":2}",
                           "{\"a\":1,\"\\u0061\":2}"}) {
    EXPECT_NE(json_error(text), "") << text;
  }
}

TEST(Json, RefusesBadUtf8AndLoneSurrogates) {
  for (const char* text :
       {"\"\x80\"", "\"\xc0\x80\"", "\"\xc1\xbf\"", "\"\xe0\x80\x80\"", "\"\xed\xa0\x80\"",
        "\"\xf0\x80\x80\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xf5\x80\x80\x80\"", "\"\xc3\"",
        "\"\xe2\x82\"", "\"\\ud800\"", "\"\\udc00\"", "\"\\ud800\\u0041\"", "\"\\ud800x\""}) {
    EXPECT_NE(json_error(text), "");
  }
}

TEST(Json, DecodesEscapes) {
  EXPECT_EQ(json_string(R"("\"\\\/\b\f\n\r\t")"), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(json_string(R"("\u0041\u00e9\u20AC\ud83d\ude00")"),
            "A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80");
  EXPECT_EQ(json_string(R"("\u0000")"), std::string(1, '\0'));
}

TEST(Json, ChecksTheRangeOfIntegers) {
  const auto u64 = [](const char* text) { return JsonReader(text, "it").unsigned_integer(); };
  const auto i64 = [](const char* text) { return JsonReader(text, "it").integer(); };
  EXPECT_EQ(u64("18446744073709551615"), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(i64("-9223372036854775808"), std::numeric_limits<int64_t>::min());
  EXPECT_THROW(u64("18446744073709551616"), ContentError);
  EXPECT_THROW(u64("-1"), ContentError);
  EXPECT_THROW(u64("1.0"), ContentError);
  EXPECT_THROW(u64("1e3"), ContentError);
  EXPECT_THROW(i64("9223372036854775808"), ContentError);
  EXPECT_THROW(i64("\"1\""), ContentError);
}

TEST(Json, LimitsDepth) {
  EXPECT_EQ(json_error(std::string(32, '[') + std::string(32, ']')), "");
  EXPECT_EQ(json_error(std::string(33, '[') + std::string(33, ']')),
            "the text is nested deeper than 32 levels at byte 33");
  EXPECT_NE(json_error(std::string(1'000'000, '[')), "");
}

TEST(Json, WritesWhatItReads) {
  const std::string odd("q\"\\\n\x01\x1f/\xc3\xa9\0z", 11);
  JsonWriter json;
  json.begin_object().key(odd).begin_array().number(0.1).number(2).integer(-3).end_array();
  json.key("b").string(odd).end_object();
  EXPECT_EQ(json.text(),
            "{\"q\\\"\\\\\\u000a\\u0001\\u001f/\xc3\xa9\\u0000z\":[0.1,2,-3],"
            "\"b\":\"q\\\"\\\\\\u000a\\u0001\\u001f/\xc3\xa9\\u0000z\"}");
  JsonReader reader(json.text(), "it");
  std::vector<double> numbers;
  std::string value;
  reader.object([&](const std::string& key) {
    if (key == odd) reader.array([&] { numbers.push_back(reader.number()); });
    if (key == "b") value = reader.string();
  });
  reader.finish();
  EXPECT_THAT(numbers, ElementsAre(0.1, 2, -3));
  EXPECT_EQ(value, odd);
}

TEST(Json, WriterRefusesWhatJsonCannotSay) {
  EXPECT_THROW(JsonWriter().string("\xff"), ContentError);
  EXPECT_THROW(JsonWriter().number(std::numeric_limits<double>::infinity()), ContentError);
  EXPECT_THROW(JsonWriter().number(std::nan("")), ContentError);
}

TEST(Json, ShowsTextThatIsSafeToPrint) {
  EXPECT_EQ(shown("a\n\xff\xc3\xa9"), "'a??\xc3\xa9'");
  EXPECT_EQ(shown(std::string(500, 'x'), 3), "'xxx...'");
}

std::string digest(const std::string& text, size_t piece) {
  Sha256 hash;
  for (size_t at = 0; at < text.size(); at += piece) {
    hash.update(text.data() + at, std::min(piece, text.size() - at));
  }
  return hash.finish();
}

TEST(Sha256, AgreesWithTheStandardsExamples) {
  EXPECT_EQ(digest("", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(digest("abc", 9), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(digest(std::string(1'000'000, 'a'), 4'099),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, DoesNotDependOnThePieces) {
  const std::string text(300, 'q');
  for (size_t size = 0; size <= text.size(); ++size) {
    const std::string part = text.substr(0, size);
    ASSERT_EQ(digest(part, 1), digest(part, 301)) << size;
    ASSERT_EQ(digest(part, 63), digest(part, 65)) << size;
  }
}

// One tensor as a header spells it.
std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  std::string text = "\"";
  text.append(name).append("\":{\"dtype\":\"").append(dtype).append("\",\"shape\":");
  return text.append(shape).append(",\"data_offsets\":").append(offsets).append("}");
}

// `count` entries t0, t1, … alike but for the name.
std::string many_entries(size_t count, const std::string& shape, const std::string& offsets) {
  std::string json = "{";
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) json += ',';
    std::string name = "t";
    json += entry(name.append(std::to_string(i)), "F32", shape, offsets);
  }
  return json.append("}");
}

std::string header_error(const std::string& json, uint64_t data_size) {
  return error_of<ContentError>([&] { parse_header(json, data_size); });
}

TEST(Header, ReadsTensorsInTheOrderOfTheirData) {
  const Header header = parse_header(
      " {" + entry("b", "F32", "[2,1]", "[2,10]") + "," + entry("a", "I8", "[2]", "[0,2]") + "," +
          entry("c", "U8", "[0,7]", "[2,2]") + "," + entry("d", "BOOL", "[]", "[10,11]") +
          ",\"__metadata__\":{\"k\":\"v\"}} \n",
      11);
  ASSERT_EQ(header.tensors.size(), 4U);
  EXPECT_EQ(header.tensors[0].name, "a");
  EXPECT_EQ(header.tensors[1].name, "c");
  EXPECT_EQ(header.tensors[2].name, "b");
  EXPECT_THAT(header.tensors[2].shape, ElementsAre(2, 1));
  EXPECT_EQ(header.tensors[2].size(), 8U);
  EXPECT_TRUE(header.tensors[3].shape.empty());
  EXPECT_EQ(header.metadata.at("k"), "v");
  EXPECT_TRUE(parse_header("{}", 0).tensors.empty());
}

struct BadHeader {
  std::string what;
  std::string json;
  uint64_t data_size;
  std::string sentence;  // a part of it
};

std::vector<BadHeader> bad_spans_and_shapes() {
  const std::string huge = "4294967296";  // 2^32: its square wraps to 0 in 64 bits
  return {
      {"overlap",
       "{" + entry("a", "I8", "[2]", "[0,2]") + "," + entry("b", "I8", "[2]", "[0,2]") + "}", 2,
       "'b' must begin at byte 2"},
      {"hole",
       "{" + entry("a", "I8", "[2]", "[0,2]") + "," + entry("b", "I8", "[2]", "[3,5]") + "}", 5,
       "must begin at byte 2"},
      {"hole in front", "{" + entry("a", "I8", "[2]", "[1,3]") + "}", 3, "must begin at byte 0"},
      {"trailing bytes", "{" + entry("a", "I8", "[2]", "[0,2]") + "}", 3, "must have 2 bytes"},
      {"missing bytes", "{" + entry("a", "I8", "[2]", "[0,2]") + "}", 1, "got 1"},
      {"bytes without tensors", "{}", 1, "must have 0 bytes"},
      {"shape and span", "{" + entry("a", "F32", "[3]", "[0,8]") + "}", 8, "must take 12 bytes"},
      {"wrapping product", "{" + entry("a", "F32", "[" + huge + "," + huge + "]", "[0,0]") + "}", 0,
       "less than 2^63 bytes"},
      {"wrapping bytes", "{" + entry("a", "F32", "[4611686018427387904]", "[0,0]") + "}", 0,
       "less than 2^63 bytes"},
      {"wrapping beside a zero",
       "{" + entry("a", "F32", "[0," + huge + "," + huge + "]", "[0,0]") + "}", 0,
       "less than 2^63 bytes"},
      {"dimension of 2^63", "{" + entry("a", "I8", "[9223372036854775808]", "[0,0]") + "}", 0,
       "dimensions below 2^63"},
      {"dimension of 2^64", "{" + entry("a", "I8", "[18446744073709551616]", "[0,0]") + "}", 0,
       "must have an integer"},
      {"negative dimension", "{" + entry("a", "I8", "[-1]", "[0,1]") + "}", 1, "got '-1'"},
      {"fraction", "{" + entry("a", "I8", "[1.0]", "[0,1]") + "}", 1, "got '1.0'"},
      {"rank", "{" + entry("a", "I8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]") + "}", 1,
       "at most 16 dimensions"},
      {"reversed span", "{" + entry("a", "I8", "[0]", "[1,0]") + "}", 0, "not above the second"},
      {"one offset", "{" + entry("a", "I8", "[1]", "[0]") + "}", 1, "two data_offsets"},
      {"three offsets", "{" + entry("a", "I8", "[1]", "[0,1,1]") + "}", 1, "two data_offsets"},
  };
}

std::vector<BadHeader> bad_structures() {
  return {
      {"truncated", "{" + entry("a", "F32", "[1]", "[0,4]"), 4, "must have '}'"},
      {"two values", "{}{}", 0, "must end after its value"},
      {"an array", "[]", 0, "must have an object"},
      {"not UTF-8", "{\"\xff\":1}", 0, "is not UTF-8"},
      {"sub-byte dtype", "{" + entry("a", "F4", "[3]", "[0,2]") + "}", 2, "got 'F4'"},
      {"unknown dtype", "{" + entry("a", "C64", "[1]", "[0,8]") + "}", 8, "got 'C64'"},
      {"same name",
       "{" + entry("a", "I8", "[1]", "[0,1]") + "," + entry("a", "I8", "[1]", "[1,2]") + "}", 2,
       "the key 'a' twice"},
      {"same key", "{\"a\":{\"dtype\":\"I8\",\"dtype\":\"I8\"}}", 0, "the key 'dtype' twice"},
      {"missing key", "{\"a\":{\"dtype\":\"I8\",\"shape\":[1]}}", 1, "got 2 of them"},
      {"unknown key", "{\"a\":{\"type\":\"I8\"}}", 1, "got 'type'"},
      {"entry of another kind", "{\"a\":3}", 0, "must have an object"},
      {"metadata of numbers", "{\"__metadata__\":{\"a\":1}}", 0, "must have a string"},
      {"nested metadata", "{\"__metadata__\":{\"a\":{}}}", 0, "must have a string"},
      {"metadata null", "{\"__metadata__\":null}", 0, "must have an object"},
      {"metadata twice", "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "twice"},
      {"long name", "{" + entry(std::string(4097, 'n'), "I8", "[1]", "[0,1]") + "}", 1,
       "at most 4096 bytes"},
  };
}

TEST(Header, RefusesEveryMalformedCaseInASentence) {
  for (const auto& cases : {bad_spans_and_shapes(), bad_structures()}) {
    for (const BadHeader& bad : cases) {
      EXPECT_THAT(header_error(bad.json, bad.data_size), HasSubstr(bad.sentence)) << bad.what;
    }
  }
}

TEST(Header, RefusesTenTensorsOnOneSpan) {
  EXPECT_THAT(header_error(many_entries(10, "[2,2]", "[0,16]"), 16),
              HasSubstr("'t1' must begin at byte 16"));
}

TEST(Header, LimitsTheNumberOfTensors) {
  EXPECT_EQ(header_error(many_entries(kMaxTensors, "[0]", "[0,0]"), 0), "");
  EXPECT_THAT(header_error(many_entries(kMaxTensors + 1, "[0]", "[0,0]"), 0),
              HasSubstr("at most 65536 tensors"));
}

TEST(Header, ChecksItsLengthAgainstTheFile) {
  const auto length = [](uint64_t n, uint64_t file_size) {
    unsigned char prefix[8];
    std::memcpy(prefix, &n, 8);
    return header_length(prefix, file_size);
  };
  EXPECT_EQ(length(2, 10), 2U);
  EXPECT_THROW(length(0, 7), ContentError);
  EXPECT_THROW(length(3, 10), ContentError);
  EXPECT_THROW(length(kMaxHeader + 1, UINT64_MAX), ContentError);
  EXPECT_THROW(length(UINT64_MAX, UINT64_MAX), ContentError);
}

Header sample_header() {
  Header header;
  header.tensors = {{"i", Dtype::kI8, {3}, 0, 0},
                    {"w", Dtype::kF32, {2, 2}, 0, 0},
                    {"d", Dtype::kF64, {}, 0, 0},
                    {"a", Dtype::kF32, {1}, 0, 0}};
  header.metadata = {{"format", "pt"}};
  assign_spans_(header);
  return header;
}

TEST(Header, IsWrittenAlignedAndInOrder) {
  const std::string bytes = serialize_header(sample_header());
  EXPECT_EQ(bytes.size() % 8, 0U);
  EXPECT_EQ(bytes[8], '{');
  const Header header = parse_header(bytes.substr(8), 31);
  std::vector<std::string> names;
  for (const TensorEntry& tensor : header.tensors) {
    names.push_back(tensor.name);
    EXPECT_EQ(tensor.begin % dtype_size(tensor.dtype), 0U);
  }
  EXPECT_THAT(names, ElementsAre("d", "a", "w", "i"));
  EXPECT_EQ(header.metadata.at("format"), "pt");
}

TEST(Header, IsNotWrittenWhereItCouldNotBeRead) {
  const auto written = [](const std::string& name, const std::string& value) {
    Header header;
    header.tensors = {{name, Dtype::kI8, {1}, 0, 1}};
    header.metadata = {{"k", value}};
    return error_of<ContentError>([&] { serialize_header(header); });
  };
  EXPECT_EQ(written("a", "v"), "");
  EXPECT_THAT(written("__metadata__", "v"), HasSubstr("must not be named"));
  EXPECT_THAT(written("\xff", "v"), HasSubstr("UTF-8"));
  EXPECT_THAT(written("a", "\xc3"), HasSubstr("UTF-8"));
  EXPECT_THAT(written(std::string(5000, 'n'), "v"), HasSubstr("at most 4096 bytes"));
  EXPECT_THAT(written("a", std::string(kMaxHeader, 'v')), HasSubstr("at most 100000000 bytes"));
}

TEST(Header, SurvivesMutations) {
  const std::string good = serialize_header(sample_header()).substr(8);
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string json = good;
    for (unsigned k = 0; k <= random() % 4; ++k) {
      json[random() % json.size()] =
          random() % 2 ? static_cast<char>(random()) : "{}[]\",:0123456789\\"[random() % 18];
    }
    try {
      uint64_t at = 0;
      for (const TensorEntry& tensor : parse_header(json, 31).tensors) {
        ASSERT_EQ(tensor.begin, at);
        at = tensor.end;
        ASSERT_EQ(tensor.size(), checked_size(tensor.shape, tensor.dtype));
      }
      ASSERT_EQ(at, 31U);
    } catch (const ContentError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 10'000);
}

class AtomicFiles : public reslora::testing::InFolder {
 protected:
  void SetUp() override {
    InFolder::SetUp();
    path_ = folder_ + "/adapter.safetensors";
  }
  std::string content() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  }
  mode_t mode() const {
    struct stat status {};
    return ::stat(path_.c_str(), &status) == 0 ? status.st_mode & 07777 : 0;
  }
  void save(const std::string& text, FileSystem& system = real_file_system()) const {
    AtomicFile file(path_, system);
    file.write(text.data(), text.size() / 2);
    file.write(text.data() + text.size() / 2, text.size() - text.size() / 2);
    file.commit();
  }

  [[noreturn]] void save_for_ever() const noexcept {
    for (int i = 1;; ++i) save(std::string(200'000, static_cast<char>('a' + i % 26)));
  }

  std::string path_;
};

// Fails the call number `fail_at` with `error` (0: a short write); EINTR does nothing, and a failed
// close has closed, as on Linux.
class FaultyFileSystem : public FileSystem {
 public:
  FaultyFileSystem(int fail_at, int error) : fail_at_(fail_at), error_(error) {}
  bool has_failed() const { return calls_ > fail_at_; }
  bool has_renamed() const { return has_renamed_; }
  int open_files() const { return open_files_; }

  int open(const char* path, int flags, mode_t mode) override {
    if (fails()) return -1;
    ++open_files_;
    return FileSystem::open(path, flags, mode);
  }
  int stat(const char* path, struct stat* out) override {
    return fails() ? -1 : FileSystem::stat(path, out);
  }
  int fchmod(int descriptor, mode_t mode) override {
    return fails() ? -1 : FileSystem::fchmod(descriptor, mode);
  }
  ssize_t pwrite(int descriptor, const void* data, size_t size, off_t offset) override {
    if (fails() && error_ != 0) return -1;
    return FileSystem::pwrite(descriptor, data, error_ == 0 ? std::min<size_t>(size, 3) : size,
                              offset);
  }
  int fsync(int descriptor) override { return fails() ? -1 : FileSystem::fsync(descriptor); }
  int close(int descriptor) override {
    --open_files_;
    FileSystem::close(descriptor);
    return fails() ? -1 : 0;
  }
  int rename(const char* from, const char* to) override {
    if (fails()) return -1;
    has_renamed_ = true;
    return FileSystem::rename(from, to);
  }

 private:
  bool fails() {
    errno = error_;
    return calls_++ == fail_at_ && error_ != 0;
  }

  int fail_at_;
  int error_;
  int calls_ = 0;
  int open_files_ = 0;
  bool has_renamed_ = false;
};

class AtomicFileFaults : public AtomicFiles, public ::testing::WithParamInterface<int> {};

TEST_P(AtomicFileFaults, LeaveTheOldFileOrTheNewOneAndNoOther) {
  const int error = GetParam();
  int fail_at = 0;
  for (bool has_failed = true; has_failed; ++fail_at) {
    save("old");
    FaultyFileSystem system(fail_at, error);
    const std::string message = error_of<FileError>([&] { save("the new content", system); });
    has_failed = system.has_failed();
    EXPECT_EQ(content(), system.has_renamed() ? "the new content" : "old") << fail_at;
    EXPECT_THAT(names(), ElementsAre("adapter.safetensors")) << fail_at;
    EXPECT_EQ(system.open_files(), 0) << fail_at;
    if (system.has_renamed()) {
      EXPECT_TRUE(message.empty() || error != EINTR) << fail_at << message;
    } else {
      EXPECT_THAT(message, HasSubstr(std::strerror(error))) << fail_at;
    }
  }
  // All of: stat, open, two writes, fchmod, fsync, close, rename, open, fsync, close.
  EXPECT_EQ(fail_at, 12);
}

INSTANTIATE_TEST_SUITE_P(Errors, AtomicFileFaults, ::testing::Values(ENOSPC, EIO, EINTR, EDQUOT),
                         [](const auto& info) { return "Errno" + std::to_string(info.param); });

TEST_F(AtomicFiles, ShortWritesAreContinued) {
  FaultyFileSystem system(-1, 0);
  save("longer than one short write", system);
  EXPECT_EQ(content(), "longer than one short write");
}

TEST_F(AtomicFiles, AnInterruptedCallIsRepeated) {
  for (const int call : {1, 2, 3, 4}) {  // open, both writes, fsync of a new file
    ::unlink(path_.c_str());
    FaultyFileSystem system(call, EINTR);
    EXPECT_NO_THROW(save("text", system)) << call;
    EXPECT_EQ(content(), "text") << call;
  }
}

TEST_F(AtomicFiles, ANewFileHasTheModeOfTheUmask) {
  const mode_t old = ::umask(027);
  save("text");
  ::umask(old);
  EXPECT_EQ(mode(), 0640U);
}

TEST_F(AtomicFiles, AReplacedFileKeepsItsMode) {
  save("old");
  for (const mode_t wanted : {0600U, 0666U, 0444U}) {
    ASSERT_EQ(::chmod(path_.c_str(), wanted), 0);
    save("new");
    EXPECT_EQ(mode(), wanted);
  }
}

TEST_F(AtomicFiles, AFileThatIsNotCommittedLeavesNothing) {
  { AtomicFile(path_).write("abc", 3); }
  EXPECT_TRUE(names().empty());
}

TEST_F(AtomicFiles, OnlyRegularFilesAreReadAndReplaced) {
  EXPECT_THROW(InputFile{folder_}, FileError);
  EXPECT_THROW(AtomicFile{folder_}, FileError);
  EXPECT_THROW(InputFile{path_}, FileError);
  EXPECT_THROW(AtomicFile{folder_ + "/none/file"}, FileError);
  ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
  EXPECT_THROW(InputFile{path_}, FileError);
  EXPECT_THROW(AtomicFile{path_}, FileError);
  EXPECT_EQ(names().size(), 1U);
}

TEST_F(AtomicFiles, LongNamesFit) {
  path_ = folder_ + "/" + std::string(NAME_MAX, 'n');
  save("text");
  EXPECT_EQ(content(), "text");
}

TEST_F(AtomicFiles, AFileThatShrinksIsAnError) {
  save(std::string(100, 'x'));
  InputFile file(path_);
  ASSERT_EQ(::truncate(path_.c_str(), 50), 0);
  std::string bytes(100, '\0');
  EXPECT_THROW(file.read(bytes.data(), bytes.size()), FileError);
}

TEST_F(AtomicFiles, AKilledWriterLeavesAWholeFile) {
  save(std::string(200'000, 'a'));
  std::mt19937 random(7);
  std::string seen;
  for (int round = 0; round < 50; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) save_for_ever();
    ::usleep(random() % 5'000);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const std::string text = content();
    ASSERT_EQ(text.size(), 200'000U);
    ASSERT_EQ(text, std::string(text.size(), text[0]));
    seen += text[0];
  }
  EXPECT_NE(seen, std::string(seen.size(), 'a'));  // some were killed after a whole file
}

}  // namespace
