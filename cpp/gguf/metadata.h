// Metadata: the key/value pairs of a GGUF header, validated, in a private copy of the header bytes
// (so nothing that was checked can change under us). In: header bytes. Out: typed values, or an
// Error (kGguf) naming file, key, expected and found. Strings are views that live as long as the
// Metadata; they are any bytes, not always UTF-8. It knows nothing about tensors or architectures.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace coreinfer {

// Values are GGUF's metadata type ids.
enum class ValueType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kU16 = 2,
  kI16 = 3,
  kU32 = 4,
  kI32 = 5,
  kF32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kU64 = 10,
  kI64 = 11,
  kF64 = 12,
};

// "u32", "string", "array" …; "unknown" for ids outside the enumeration.
std::string_view value_type_name(ValueType type);
// Bytes of one scalar; 0 for strings and arrays, whose size is in the file.
size_t value_type_bytes(ValueType type);

// One key and where its value lies. For a scalar element == type and count == 1.
struct MetadataEntry {
  std::string_view key;
  ValueType type = ValueType::kU8;
  ValueType element = ValueType::kU8;  // of an array; never kArray
  uint64_t count = 0;                  // elements
  // Packed little-endian values, possibly unaligned. For strings each one is its length (u64) and
  // its bytes, also when there is only one.
  std::span<const std::byte> data;
};

class Metadata {
 public:
  Metadata() = default;
  Metadata(Metadata&&) = default;
  Metadata& operator=(Metadata&&) = default;
  Metadata(const Metadata&) = delete;
  Metadata& operator=(const Metadata&) = delete;

  bool has(std::string_view key) const { return find(key).has_value(); }
  size_t size() const { return records_.size(); }
  MetadataEntry entry(size_t index) const;  // in file order
  std::optional<MetadataEntry> find(std::string_view key) const;

  // Required scalars: throw when the key is absent, has another type, or the value does not fit.
  // Integers of any width and sign are accepted where the value fits; f32 takes f32 and f64.
  uint32_t u32(std::string_view key) const;
  int32_t i32(std::string_view key) const;
  uint64_t u64(std::string_view key) const;
  float f32(std::string_view key) const;
  bool boolean(std::string_view key) const;
  std::string string(std::string_view key) const;

  // The same, but an absent key is std::nullopt. A present key of the wrong type still throws.
  std::optional<uint32_t> maybe_u32(std::string_view key) const;
  std::optional<int32_t> maybe_i32(std::string_view key) const;
  std::optional<uint64_t> maybe_u64(std::string_view key) const;
  std::optional<float> maybe_f32(std::string_view key) const;
  std::optional<bool> maybe_boolean(std::string_view key) const;
  std::optional<std::string> maybe_string(std::string_view key) const;

  // Arrays: throw when the key is absent, is not an array, or has another element type.
  uint64_t array_size(std::string_view key) const;
  std::vector<std::string_view> strings(std::string_view key) const;
  std::vector<int64_t> integers(std::string_view key) const;  // any integer type that fits
  std::vector<float> floats(std::string_view key) const;      // f32 or f64
  std::vector<bool> booleans(std::string_view key) const;

  // Every string of an entry of strings (one for a scalar).
  static std::vector<std::string_view> strings_of(const MetadataEntry& entry);

  // The header bytes of the file this came from: header, metadata and tensor infos.
  std::span<const std::byte> header() const { return header_; }

 private:
  friend class MetadataParser;

  struct Record {  // positions in header_, since the buffer moves while it is read
    size_t key_at, key_bytes;
    ValueType type, element;
    uint64_t count;
    size_t data_at, data_bytes;
  };

  std::string_view key_of(const Record& record) const;
  MetadataEntry require(std::string_view key) const;
  MetadataEntry require_array(std::string_view key, const char* expected) const;
  [[noreturn]] void wrong_type(const MetadataEntry& entry, const char* expected) const;
  template <class T>
  T integer_value(const MetadataEntry& entry, const char* expected) const;
  float float_value(const MetadataEntry& entry) const;

  std::string path_;
  std::vector<std::byte> header_;
  std::vector<Record> records_;
  std::vector<uint32_t> by_key_;  // record indices in the order of their keys
};

}  // namespace coreinfer
