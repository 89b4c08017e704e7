// ByteReader: a cursor over the header of one file, which it copies to memory piece by piece.
// In: a mapped file (read through read(), so that truncation is an error and not a fault).
// Out: little-endian numbers and strings, each checked against the bytes that remain, which it
// carries along. Every failure throws kGguf with file, position and what was being read.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/mmap_file.h"

namespace coreinfer {

static_assert(std::endian::native == std::endian::little, "GGUF is read without swapping bytes");

// Text from a file made fit for a message: control bytes and invalid UTF-8 as \xNN, long text cut.
std::string printable(std::string_view text);
bool is_valid_utf8(std::string_view text);

class ByteReader {
 public:
  explicit ByteReader(const MmapFile& file);

  const std::string& path() const { return file_.path(); }
  uint64_t position() const { return position_; }
  uint64_t remaining() const { return remaining_; }

  // What is being read, for messages: "tensor info 3", with its name once that is known.
  void set_item(const char* kind, uint64_t index);
  void set_name(std::string_view name) { name_ = name; }

  template <class T>
  T read(const char* field) {
    need(sizeof(T), field);
    T value;
    std::memcpy(&value, buffer_.data() + position_, sizeof(T));
    advance(sizeof(T));
    return value;
  }

  // A length (u64) and so many bytes, at most `cap`. The view ends with the next read.
  std::string_view string(const char* field, uint64_t cap);
  void skip(uint64_t bytes, const char* field);

  // Throws kGguf: "FILE: tensor info 3 'name': " and the message.
  [[noreturn]] void fail(const char* format, ...) const __attribute__((format(printf, 2, 3)));

  // Hands over the bytes read so far. The reader is of no use afterwards.
  std::vector<std::byte> take_header();
  const std::byte* bytes_at(uint64_t position) const { return buffer_.data() + position; }

 private:
  void need(uint64_t bytes, const char* field);
  void fill(uint64_t end);
  void advance(uint64_t bytes) {
    position_ += bytes;
    remaining_ -= bytes;
  }

  const MmapFile& file_;
  std::vector<std::byte> buffer_;  // the file from its start to somewhere at or past position_
  uint64_t position_ = 0;
  uint64_t remaining_;  // bytes of the file from position_ on
  const char* kind_ = "header";
  uint64_t index_ = 0;
  bool indexed_ = false;
  std::string name_;
};

}  // namespace coreinfer
