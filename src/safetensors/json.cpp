// Reading JSON in one walk from left to right, and writing it; json.h says what is refused.
#include "safetensors/json.h"

#include <charconv>
#include <cmath>
#include <set>

namespace reslora::detail {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Length in bytes of the UTF-8 sequence that starts at text[at]; 0 where it is none (Unicode 15,
// table 3-7: overlong forms, surrogates and code points above U+10FFFF are none).
size_t utf8_length(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0U;
  };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0U) == 0x80U; };
  const unsigned first = byte(0);
  const unsigned second = byte(1);
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return continues(1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const bool is_overlong = first == 0xE0 && second < 0xA0;
    const bool is_surrogate = first == 0xED && second >= 0xA0;
    return continues(1) && continues(2) && !is_overlong && !is_surrogate ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool is_overlong = first == 0xF0 && second < 0x90;
    const bool is_beyond = first == 0xF4 && second >= 0x90;
    return continues(1) && continues(2) && continues(3) && !is_overlong && !is_beyond ? 4 : 0;
  }
  return 0;
}

bool is_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t length = utf8_length(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) return put(code);
  if (code < 0x800) {
    put(0xC0 | code >> 6);
  } else {
    if (code < 0x10000) {
      put(0xE0 | code >> 12);
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 0x3F));
    }
    put(0x80 | (code >> 6 & 0x3F));
  }
  put(0x80 | (code & 0x3F));
}

}  // namespace

void JsonReader::fail(const std::string& rule) const {
  throw ContentError(subject_ + " " + rule + " at byte " + std::to_string(at_));
}

void JsonReader::skip_space() {
  const size_t found = text_.find_first_not_of(" \t\n\r", at_);
  at_ = found == std::string_view::npos ? text_.size() : found;
}

bool JsonReader::take(char c) {
  skip_space();
  if (at_ == text_.size() || text_[at_] != c) return false;
  ++at_;
  return true;
}

void JsonReader::expect(char c) {
  if (!take(c)) fail(std::string("must have '") + c + "'");
}

char JsonReader::next() {
  if (at_ == text_.size()) fail("ends too early");
  return text_[at_++];
}

void JsonReader::enter(char bracket, const char* what) {
  if (!take(bracket)) fail(std::string("must have ") + what);
  if (++depth_ > max_depth_)
    fail("is nested deeper than " + std::to_string(max_depth_) + " levels");
}

void JsonReader::object(const std::function<void(const std::string& key)>& member) {
  enter('{', "an object");
  std::set<std::string> seen;
  bool is_open = !take('}');
  while (is_open) {
    const auto [key, is_first] = seen.insert(string());
    if (!is_first) fail("gives the key " + shown(*key) + " twice");
    expect(':');
    member(*key);
    is_open = take(',');
    if (!is_open) expect('}');
  }
  --depth_;
}

void JsonReader::array(const std::function<void()>& element) {
  enter('[', "an array");
  bool is_open = !take(']');
  while (is_open) {
    element();
    is_open = take(',');
    if (!is_open) expect(']');
  }
  --depth_;
}

std::string JsonReader::string() {
  if (!take('"')) fail("must have a string");
  std::string out;
  for (;;) {
    if (at_ == text_.size()) fail("ends inside a string");
    const char c = text_[at_];
    if (c == '"') break;
    if (c == '\\') {
      ++at_;
      escape(out);
      continue;
    }
    if (static_cast<unsigned char>(c) < 0x20) fail("has a control character in a string");
    const size_t length = utf8_length(text_, at_);
    if (length == 0) fail("is not UTF-8");
    out.append(text_, at_, length);
    at_ += length;
  }
  ++at_;
  return out;
}

void JsonReader::escape(std::string& out) {
  constexpr std::string_view kNames = "\"\\/bfnrt";
  constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
  const char c = next();
  if (const size_t i = kNames.find(c); i != std::string_view::npos) {
    out += kValues[i];
    return;
  }
  if (c != 'u') fail("has an unknown escape");
  uint32_t code = four_hex_digits();
  if (code >= 0xDC00 && code <= 0xDFFF) fail("has a lone surrogate");
  if (code >= 0xD800 && code <= 0xDBFF) {
    if (next() != '\\' || next() != 'u') fail("has a lone surrogate");
    const uint32_t low = four_hex_digits();
    if (low < 0xDC00 || low > 0xDFFF) fail("has a lone surrogate");
    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
  }
  append_utf8(out, code);
}

uint32_t JsonReader::four_hex_digits() {
  uint32_t code = 0;
  const std::string_view hex = text_.substr(at_, 4);
  const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), code, 16);
  if (hex.size() < 4 || error != std::errc() || end != hex.data() + 4) {
    fail("must have four hex digits");
  }
  at_ += 4;
  return code;
}

void JsonReader::digits() {
  if (at_ == text_.size() || !is_digit(text_[at_])) fail("must have a digit");
  while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
}

std::string_view JsonReader::number_token() {
  skip_space();
  const size_t begin = at_;
  const auto is_next = [&](std::string_view any) {
    return at_ < text_.size() && any.find(text_[at_]) != std::string_view::npos;
  };
  if (is_next("-")) ++at_;
  if (!is_next("0123456789")) fail("must have a number");
  if (is_next("0")) {
    ++at_;
    if (is_next("0123456789")) fail("has a number with a leading zero");
  } else {
    digits();
  }
  if (is_next(".")) {
    ++at_;
    digits();
  }
  if (is_next("eE")) {
    ++at_;
    if (is_next("+-")) ++at_;
    digits();
  }
  return text_.substr(begin, at_ - begin);
}

uint64_t JsonReader::unsigned_integer() {
  const std::string_view token = number_token();
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
  if (error != std::errc() || end != token.data() + token.size()) {
    fail("must have an integer from 0 to 2^64 - 1; got " + shown(token));
  }
  return value;
}

int64_t JsonReader::integer() {
  const std::string_view token = number_token();
  int64_t value = 0;
  const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
  if (error != std::errc() || end != token.data() + token.size()) {
    fail("must have an integer of 64 bits; got " + shown(token));
  }
  return value;
}

double JsonReader::number() {
  const std::string_view token = number_token();
  double value = 0;
  const auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
  if (error != std::errc() || end != token.data() + token.size()) {
    fail("must have a number that a double can hold; got " + shown(token));
  }
  return value;
}

void JsonReader::literal(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) fail("must have a value");
  at_ += word.size();
}

void JsonReader::skip() {
  skip_space();
  switch (at_ < text_.size() ? text_[at_] : '\0') {
    case '{':
      return object([this](const std::string&) { skip(); });
    case '[':
      return array([this] { skip(); });
    case '"':
      string();
      return;
    case 't':
      return literal("true");
    case 'f':
      return literal("false");
    case 'n':
      return literal("null");
    default:
      number();
  }
}

bool JsonReader::boolean() {
  const bool is_true = peek() == 't';
  literal(is_true ? "true" : "false");
  return is_true;
}

bool JsonReader::null() {
  const bool is_next = peek() == 'n';
  if (is_next) literal("null");
  return is_next;
}

char JsonReader::peek() {
  skip_space();
  return at_ < text_.size() ? text_[at_] : '\0';
}

std::string JsonReader::raw() {
  skip_space();
  const size_t begin = at_;
  skip();
  return std::string(text_.substr(begin, at_ - begin));
}

void JsonReader::finish() {
  skip_space();
  if (at_ != text_.size()) fail("must end after its value");
}

void JsonWriter::new_line() {
  if (indent_ == 0) return;
  text_ += '\n';
  text_.append(static_cast<size_t>(indent_) * depth_, ' ');
}

void JsonWriter::separate() {
  if (needs_comma_) text_ += ',';
  if (depth_ > 0 && !follows_key_) new_line();
  needs_comma_ = true;
  follows_key_ = false;
}

JsonWriter& JsonWriter::open(char bracket) {
  separate();
  text_ += bracket;
  needs_comma_ = false;
  ++depth_;
  return *this;
}

JsonWriter& JsonWriter::close(char bracket) {
  --depth_;
  if (needs_comma_) new_line();  // not between the brackets of what is empty
  text_ += bracket;
  needs_comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::begin_object() { return open('{'); }
JsonWriter& JsonWriter::end_object() { return close('}'); }
JsonWriter& JsonWriter::begin_array() { return open('['); }
JsonWriter& JsonWriter::end_array() { return close(']'); }

JsonWriter& JsonWriter::key(std::string_view text) {
  string(text);
  text_ += indent_ > 0 ? ": " : ":";
  needs_comma_ = false;
  follows_key_ = true;
  return *this;
}

JsonWriter& JsonWriter::string(std::string_view text) {
  if (!is_utf8(text)) throw ContentError("text must be UTF-8; got " + shown(text));
  separate();
  text_ += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      text_ += '\\';
      text_ += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      text_ += "\\u00";
      text_ += "01"[c >> 4];
      text_ += "0123456789abcdef"[c & 15];
    } else {
      text_ += c;
    }
  }
  text_ += '"';
  return *this;
}

JsonWriter& JsonWriter::unsigned_integer(uint64_t value) { return raw(std::to_string(value)); }

JsonWriter& JsonWriter::integer(int64_t value) { return raw(std::to_string(value)); }

JsonWriter& JsonWriter::number(double value) {
  if (!std::isfinite(value)) throw ContentError("a number must be finite; got NaN or infinity");
  char buffer[32];
  const auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return raw({buffer, static_cast<size_t>(result.ptr - buffer)});
}

JsonWriter& JsonWriter::boolean(bool value) { return raw(value ? "true" : "false"); }

JsonWriter& JsonWriter::null() { return raw("null"); }

JsonWriter& JsonWriter::raw(std::string_view json) {
  separate();
  text_ += json;
  return *this;
}

std::string shown(std::string_view text, size_t limit) {
  std::string out = "'";
  size_t at = 0;
  while (at < text.size() && at < limit) {
    const size_t length = utf8_length(text, at);
    const auto byte = static_cast<unsigned char>(text[at]);
    const bool is_shown = length > 0 && byte >= 0x20 && byte != 0x7F;
    if (is_shown) {
      out.append(text, at, length);
    } else {
      out += '?';
    }
    at += length > 0 ? length : 1;
  }
  return out + (at < text.size() ? "...'" : "'");
}

}  // namespace reslora::detail
