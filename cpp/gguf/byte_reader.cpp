#include "gguf/byte_reader.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>

#include "base/error.h"
#include "gguf/limits.h"

namespace coreinfer {
namespace {

constexpr uint64_t kFirstRead = uint64_t{256} << 10;
constexpr size_t kPrintedBytes = 80;

unsigned long long ull(uint64_t n) { return n; }

// Bytes of the well-formed UTF-8 sequence at the start of text; 0 when it is none.
size_t utf8_sequence(std::string_view text) {
  const auto at = [&](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u;
  };
  const auto tail = [&](size_t i) { return (at(i) & 0xc0u) == 0x80u; };
  const unsigned lead = at(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return tail(1) ? 2 : 0;
  if (lead >= 0xe0 && lead <= 0xef) {
    if (!tail(1) || !tail(2)) return 0;
    if (lead == 0xe0 && at(1) < 0xa0) return 0;  // overlong
    if (lead == 0xed && at(1) > 0x9f) return 0;  // surrogate
    return 3;
  }
  if (lead >= 0xf0 && lead <= 0xf4) {
    if (!tail(1) || !tail(2) || !tail(3)) return 0;
    if (lead == 0xf0 && at(1) < 0x90) return 0;  // overlong
    if (lead == 0xf4 && at(1) > 0x8f) return 0;  // above U+10FFFF
    return 4;
  }
  return 0;
}

}  // namespace

bool is_valid_utf8(std::string_view text) {
  while (!text.empty()) {
    const size_t n = utf8_sequence(text);
    if (n == 0) return false;
    text.remove_prefix(n);
  }
  return true;
}

std::string printable(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    if (out.size() >= kPrintedBytes) return out + "...";
    const size_t n = utf8_sequence(text);
    const unsigned char lead = static_cast<unsigned char>(text[0]);
    if (n == 0 || lead < 0x20 || lead == 0x7f || (lead == 0xc2 && n == 2)) {  // c2: C1 controls
      char escaped[5];
      std::snprintf(escaped, sizeof escaped, "\\x%02x", lead);
      out += escaped;
      text.remove_prefix(1);
    } else {
      out += text.substr(0, n);
      text.remove_prefix(n);
    }
  }
  return out;
}

ByteReader::ByteReader(const MmapFile& file) : file_(file), remaining_(file.size()) {}

void ByteReader::set_item(const char* kind, uint64_t index) {
  kind_ = kind;
  index_ = index;
  indexed_ = true;
  name_.clear();
}

void ByteReader::fail(const char* format, ...) const {
  va_list args;
  va_start(args, format);
  char message[1024];
  std::vsnprintf(message, sizeof message, format, args);
  va_end(args);
  std::string where = path() + ": " + kind_;
  if (indexed_) where += format_string(" %llu", ull(index_));
  if (!name_.empty()) where += " '" + printable(name_) + "'";
  throw Error(ErrorKind::kGguf, where + ": " + message);
}

void ByteReader::need(uint64_t bytes, const char* field) {
  if (bytes > remaining_) {
    fail("the file ends inside the %s: %llu bytes expected at byte %llu, %llu found", field,
         ull(bytes), ull(position_), ull(remaining_));
  }
  if (position_ + bytes > buffer_.size()) fill(position_ + bytes);
}

// Reads on to at least `end`, which is inside the file; in doubling steps, so that a header costs
// a few calls and its tail at most as much again.
void ByteReader::fill(uint64_t end) {
  if (end > gguf_limits::kHeaderBytes) {
    fail("the header is longer than %llu bytes, the most that is read",
         ull(gguf_limits::kHeaderBytes));
  }
  const uint64_t have = buffer_.size();
  const uint64_t total = std::min<uint64_t>(file_.size(), std::max({end, 2 * have, kFirstRead}));
  buffer_.resize(total);
  file_.read_at(have, buffer_.data() + have, total - have);
}

std::string_view ByteReader::string(const char* field, uint64_t cap) {
  const uint64_t length = read<uint64_t>(field);
  if (length > cap) {
    fail("length of the %s is %llu bytes, at most %llu are allowed", field, ull(length), ull(cap));
  }
  need(length, field);
  const std::string_view text(reinterpret_cast<const char*>(buffer_.data() + position_), length);
  advance(length);
  return text;
}

void ByteReader::skip(uint64_t bytes, const char* field) {
  need(bytes, field);
  advance(bytes);
}

std::vector<std::byte> ByteReader::take_header() {
  buffer_.resize(position_);
  buffer_.shrink_to_fit();
  return std::move(buffer_);
}

}  // namespace coreinfer
