#include "gguf/metadata_parser.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "gguf/limits.h"

namespace coreinfer {
namespace {

// The least that an entry takes: length and one byte of key, type, one byte of value.
constexpr uint64_t kMinEntryBytes = 8 + 1 + 4 + 1;

ValueType read_type(ByteReader& reader, const char* field) {
  const uint32_t id = reader.read<uint32_t>(field);
  if (id > static_cast<uint32_t>(ValueType::kF64)) {
    reader.fail("%s is %u, expected 0 (u8) to 12 (f64)", field, id);
  }
  return static_cast<ValueType>(id);
}

void check_bools(const ByteReader& reader, uint64_t at, uint64_t count) {
  const std::byte* bytes = reader.bytes_at(at);
  for (uint64_t i = 0; i < count; ++i) {
    const unsigned value = std::to_integer<unsigned>(bytes[i]);
    if (value > 1) reader.fail("a boolean value is %u, expected 0 or 1", value);
  }
}

// Moves past `count` values of one type.
void skip_values(ByteReader& reader, ValueType type, uint64_t count) {
  if (type == ValueType::kString) {
    if (count > reader.remaining() / 8) {
      reader.fail("an array of %llu strings cannot fit: %llu bytes of the file are left",
                  static_cast<unsigned long long>(count),
                  static_cast<unsigned long long>(reader.remaining()));
    }
    for (uint64_t i = 0; i < count; ++i) reader.string("string value", gguf_limits::kStringBytes);
    return;
  }
  const uint64_t at = reader.position();
  reader.skip(count * value_type_bytes(type), "value");  // count is capped, so no overflow
  if (type == ValueType::kBool) check_bools(reader, at, count);
}

}  // namespace

void check_name(const ByteReader& reader, const char* what, std::string_view name) {
  if (name.empty()) reader.fail("the %s is empty", what);
  if (!is_valid_utf8(name)) {
    reader.fail("the %s '%s' is not valid UTF-8", what, printable(name).c_str());
  }
  for (const char c : name) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      reader.fail("the %s '%s' holds a control byte", what, printable(name).c_str());
    }
  }
}

void MetadataParser::parse(ByteReader& reader, uint64_t n_entries) {
  if (n_entries > gguf_limits::kMetadataEntries) {
    reader.fail("n_kv is %llu metadata entries, at most %llu are allowed",
                static_cast<unsigned long long>(n_entries),
                static_cast<unsigned long long>(gguf_limits::kMetadataEntries));
  }
  if (n_entries > reader.remaining() / kMinEntryBytes) {
    reader.fail("n_kv is %llu metadata entries, which cannot fit in the %llu bytes left",
                static_cast<unsigned long long>(n_entries),
                static_cast<unsigned long long>(reader.remaining()));
  }
  metadata_.path_ = reader.path();
  metadata_.records_.reserve(n_entries);
  for (uint64_t i = 0; i < n_entries; ++i) {
    reader.set_item("metadata entry", i);
    Metadata::Record record{};
    const std::string_view key = reader.string("key", gguf_limits::kKeyBytes);
    record.key_bytes = key.size();
    record.key_at = reader.position() - key.size();
    check_name(reader, "key", key);
    reader.set_name(key);

    record.type = record.element = read_type(reader, "value type");
    record.count = 1;
    if (record.type == ValueType::kArray) {
      record.element = read_type(reader, "array element type");
      if (record.element == ValueType::kArray) reader.fail("arrays of arrays are not supported");
      record.count = reader.read<uint64_t>("array length");
      if (record.count > gguf_limits::kArrayElements) {
        reader.fail("array length is %llu, at most %llu elements are allowed",
                    static_cast<unsigned long long>(record.count),
                    static_cast<unsigned long long>(gguf_limits::kArrayElements));
      }
    }
    record.data_at = reader.position();
    skip_values(reader, record.element, record.count);
    record.data_bytes = reader.position() - record.data_at;
    metadata_.records_.push_back(record);
  }
}

Metadata MetadataParser::finish(ByteReader& reader) {
  metadata_.header_ = reader.take_header();
  std::vector<uint32_t>& order = metadata_.by_key_;
  order.resize(metadata_.records_.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto key = [&](uint32_t i) { return metadata_.key_of(metadata_.records_[i]); };
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  for (size_t i = 1; i < order.size(); ++i) {
    if (key(order[i]) == key(order[i - 1])) {
      reader.set_item("metadata entry", std::max(order[i], order[i - 1]));
      reader.set_name(key(order[i]));
      reader.fail("the key is there a second time, first as entry %u; expected once",
                  std::min(order[i], order[i - 1]));
    }
  }
  return std::move(metadata_);
}

}  // namespace coreinfer
