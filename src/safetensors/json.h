// A strict reader and writer of JSON (RFC 8259), for headers and configs: no tree in memory.
//
// The reader is pulled: the caller says what must come next, so a grammar is checked where it is
// used and a hostile text cannot make us build anything.
//
//   JsonReader reader(text, "the header");
//   reader.object([&](const std::string& key) {
//     if (key == "r") r = reader.integer(); else reader.skip();
//   });
//   reader.finish();
//
// Stricter than most: duplicate keys, invalid UTF-8, lone surrogates, numbers that do not fit and
// nesting beyond a limit are refused. Errors are ContentError, one sentence with the byte offset.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace reslora::detail {

/// What is in a file, or is to be written, breaks a rule.
class ContentError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class JsonReader {
 public:
  /// Reads `text`, which the caller keeps alive; `subject` begins the sentences of its errors.
  JsonReader(std::string_view text, std::string subject, int max_depth = 32)
      : text_(text), subject_(std::move(subject)), max_depth_(max_depth) {}

  /// Reads an object; `member(key)` must read the value of `key`.
  void object(const std::function<void(const std::string& key)>& member);
  /// Reads an array; `element()` must read one element.
  void array(const std::function<void()>& element);
  std::string string();
  uint64_t unsigned_integer();
  int64_t integer();
  double number();
  bool boolean();
  /// Reads null if that is next, and tells whether it was.
  bool null();
  /// The first character of the next value; '\0' at the end.
  char peek();
  /// Reads any value and checks it.
  void skip();
  /// Reads any value and returns its text.
  std::string raw();
  /// Demands that nothing but white space is left.
  void finish();

 private:
  [[noreturn]] void fail(const std::string& rule) const;
  void enter(char bracket, const char* what);
  void expect(char c);
  bool take(char c);
  char next();
  void skip_space();
  void escape(std::string& out);
  uint32_t four_hex_digits();
  void digits();
  std::string_view number_token();
  void literal(std::string_view word);

  std::string_view text_;
  std::string subject_;
  size_t at_ = 0;
  int depth_ = 0;
  int max_depth_;
};

/// Writes JSON; commas are its business, the order of calls the caller's.
class JsonWriter {
 public:
  /// `indent`: spaces for each level, a line for each value; 0: no spaces at all.
  explicit JsonWriter(int indent = 0) : indent_(indent) {}

  JsonWriter& begin_object();
  JsonWriter& end_object();
  JsonWriter& begin_array();
  JsonWriter& end_array();
  /// Throws ContentError for text that is not UTF-8, here and in `string`.
  JsonWriter& key(std::string_view text);
  JsonWriter& string(std::string_view text);
  JsonWriter& unsigned_integer(uint64_t value);
  JsonWriter& integer(int64_t value);
  /// Writes the shortest text that reads back as the same double; throws ContentError for NaN and
  /// infinities, which JSON cannot say.
  JsonWriter& number(double value);
  JsonWriter& boolean(bool value);
  JsonWriter& null();
  /// Writes what is JSON already.
  JsonWriter& raw(std::string_view json);
  const std::string& text() const { return text_; }

 private:
  void separate();
  JsonWriter& open(char bracket);
  JsonWriter& close(char bracket);
  void new_line();

  std::string text_;
  bool needs_comma_ = false;
  bool follows_key_ = false;
  int indent_;
  int depth_ = 0;
};

/// Returns `text` in quotes for an error message: control characters and bytes that are not UTF-8
/// become '?', and what is longer than `limit` bytes is cut.
std::string shown(std::string_view text, size_t limit = 120);

}  // namespace reslora::detail
