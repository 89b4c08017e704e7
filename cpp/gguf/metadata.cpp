#include "gguf/metadata.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>

#include "base/error.h"
#include "gguf/byte_reader.h"

namespace coreinfer {
namespace {

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Calls f with the integer at `at` in its own type; false when the type is not an integer.
template <class F>
bool visit_integer(ValueType type, const std::byte* at, F f) {
  switch (type) {
    case ValueType::kU8:
      return f(load<uint8_t>(at)), true;
    case ValueType::kI8:
      return f(load<int8_t>(at)), true;
    case ValueType::kU16:
      return f(load<uint16_t>(at)), true;
    case ValueType::kI16:
      return f(load<int16_t>(at)), true;
    case ValueType::kU32:
      return f(load<uint32_t>(at)), true;
    case ValueType::kI32:
      return f(load<int32_t>(at)), true;
    case ValueType::kU64:
      return f(load<uint64_t>(at)), true;
    case ValueType::kI64:
      return f(load<int64_t>(at)), true;
    default:
      return false;
  }
}

bool is_integer(ValueType type) {
  return type != ValueType::kF32 && type != ValueType::kF64 && type != ValueType::kBool &&
         type != ValueType::kString && type != ValueType::kArray;
}

std::string type_of(const MetadataEntry& entry) {
  const std::string element(value_type_name(entry.element));
  if (entry.type != ValueType::kArray) return element;
  return format_string("array of %llu %s", static_cast<unsigned long long>(entry.count),
                       element.c_str());
}

// Beyond float's range: Inf, which the range check of whoever uses the number refuses.
float narrow(double value) {
  constexpr double kMax = std::numeric_limits<float>::max();
  if (std::isfinite(value) && std::fabs(value) > kMax) {
    return value > 0 ? std::numeric_limits<float>::infinity()
                     : -std::numeric_limits<float>::infinity();
  }
  return static_cast<float>(value);
}

}  // namespace

std::string_view value_type_name(ValueType type) {
  constexpr std::string_view kNames[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                         "bool", "string", "array", "u64", "i64", "f64"};
  const size_t id = static_cast<size_t>(type);
  return id < std::size(kNames) ? kNames[id] : "unknown";
}

size_t value_type_bytes(ValueType type) {
  constexpr size_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  const size_t id = static_cast<size_t>(type);
  return id < std::size(kBytes) ? kBytes[id] : 0;
}

// ---- Lookup -------------------------------------------------------------------------------------

std::string_view Metadata::key_of(const Record& record) const {
  return {reinterpret_cast<const char*>(header_.data()) + record.key_at, record.key_bytes};
}

MetadataEntry Metadata::entry(size_t index) const {
  const Record& r = records_.at(index);
  return {key_of(r), r.type, r.element, r.count, {header_.data() + r.data_at, r.data_bytes}};
}

std::optional<MetadataEntry> Metadata::find(std::string_view key) const {
  const auto it = std::lower_bound(
      by_key_.begin(), by_key_.end(), key,
      [&](uint32_t i, std::string_view wanted) { return key_of(records_[i]) < wanted; });
  if (it == by_key_.end() || key_of(records_[*it]) != key) return std::nullopt;
  return entry(*it);
}

MetadataEntry Metadata::require(std::string_view key) const {
  const std::optional<MetadataEntry> entry = find(key);
  if (!entry) {
    throw_error(ErrorKind::kGguf, "%s: metadata key '%s' is missing", path_.c_str(),
                printable(key).c_str());
  }
  return *entry;
}

void Metadata::wrong_type(const MetadataEntry& entry, const char* expected) const {
  throw_error(ErrorKind::kGguf, "%s: metadata key '%s': expected %s, found %s", path_.c_str(),
              printable(entry.key).c_str(), expected, type_of(entry).c_str());
}

// ---- Scalars ------------------------------------------------------------------------------------

template <class T>
T Metadata::integer_value(const MetadataEntry& entry, const char* expected) const {
  if (entry.type == ValueType::kArray || !is_integer(entry.type)) wrong_type(entry, expected);
  T result{};
  visit_integer(entry.type, entry.data.data(), [&](auto value) {
    if (!std::in_range<T>(value)) {
      throw_error(ErrorKind::kGguf, "%s: metadata key '%s': expected %s, found %s %s",
                  path_.c_str(), printable(entry.key).c_str(), expected, type_of(entry).c_str(),
                  std::to_string(value).c_str());
    }
    result = static_cast<T>(value);
  });
  return result;
}

float Metadata::float_value(const MetadataEntry& entry) const {
  if (entry.type == ValueType::kF32) return load<float>(entry.data.data());
  if (entry.type != ValueType::kF64) wrong_type(entry, "a number (f32 or f64)");
  return narrow(load<double>(entry.data.data()));
}

uint32_t Metadata::u32(std::string_view key) const {
  return integer_value<uint32_t>(require(key), "an integer in the range of u32");
}
int32_t Metadata::i32(std::string_view key) const {
  return integer_value<int32_t>(require(key), "an integer in the range of i32");
}
uint64_t Metadata::u64(std::string_view key) const {
  return integer_value<uint64_t>(require(key), "an integer in the range of u64");
}
float Metadata::f32(std::string_view key) const { return float_value(require(key)); }

bool Metadata::boolean(std::string_view key) const {
  const MetadataEntry entry = require(key);
  if (entry.type != ValueType::kBool) wrong_type(entry, "bool");
  return load<uint8_t>(entry.data.data()) != 0;
}

std::string Metadata::string(std::string_view key) const {
  const MetadataEntry entry = require(key);
  if (entry.type != ValueType::kString) wrong_type(entry, "string");
  return std::string(strings_of(entry).front());
}

std::optional<uint32_t> Metadata::maybe_u32(std::string_view key) const {
  return has(key) ? std::optional(u32(key)) : std::nullopt;
}
std::optional<int32_t> Metadata::maybe_i32(std::string_view key) const {
  return has(key) ? std::optional(i32(key)) : std::nullopt;
}
std::optional<uint64_t> Metadata::maybe_u64(std::string_view key) const {
  return has(key) ? std::optional(u64(key)) : std::nullopt;
}
std::optional<float> Metadata::maybe_f32(std::string_view key) const {
  return has(key) ? std::optional(f32(key)) : std::nullopt;
}
std::optional<bool> Metadata::maybe_boolean(std::string_view key) const {
  return has(key) ? std::optional(boolean(key)) : std::nullopt;
}
std::optional<std::string> Metadata::maybe_string(std::string_view key) const {
  return has(key) ? std::optional(string(key)) : std::nullopt;
}

// ---- Arrays -------------------------------------------------------------------------------------

MetadataEntry Metadata::require_array(std::string_view key, const char* expected) const {
  const MetadataEntry entry = require(key);
  if (entry.type != ValueType::kArray) wrong_type(entry, expected);
  return entry;
}

uint64_t Metadata::array_size(std::string_view key) const {
  return require_array(key, "an array").count;
}

std::vector<std::string_view> Metadata::strings_of(const MetadataEntry& entry) {
  std::vector<std::string_view> out;
  out.reserve(entry.count);
  const std::byte* at = entry.data.data();
  for (uint64_t i = 0; i < entry.count; ++i) {  // lengths were checked when the file was parsed
    const uint64_t length = load<uint64_t>(at);
    out.emplace_back(reinterpret_cast<const char*>(at) + 8, length);
    at += 8 + length;
  }
  return out;
}

std::vector<std::string_view> Metadata::strings(std::string_view key) const {
  const MetadataEntry entry = require_array(key, "an array of string");
  if (entry.element != ValueType::kString) wrong_type(entry, "an array of string");
  return strings_of(entry);
}

std::vector<int64_t> Metadata::integers(std::string_view key) const {
  const MetadataEntry entry = require_array(key, "an array of integers");
  if (!is_integer(entry.element)) wrong_type(entry, "an array of integers");
  std::vector<int64_t> out(entry.count);
  const size_t step = value_type_bytes(entry.element);
  for (uint64_t i = 0; i < entry.count; ++i) {
    MetadataEntry element = entry;
    element.type = entry.element;
    element.data = entry.data.subspan(i * step, step);
    out[i] = integer_value<int64_t>(element, "integers in the range of i64");
  }
  return out;
}

std::vector<float> Metadata::floats(std::string_view key) const {
  const MetadataEntry entry = require_array(key, "an array of f32 or f64");
  if (entry.element != ValueType::kF32 && entry.element != ValueType::kF64) {
    wrong_type(entry, "an array of f32 or f64");
  }
  std::vector<float> out(entry.count);
  for (uint64_t i = 0; i < entry.count; ++i) {
    out[i] = entry.element == ValueType::kF32 ? load<float>(entry.data.data() + 4 * i)
                                              : narrow(load<double>(entry.data.data() + 8 * i));
  }
  return out;
}

std::vector<bool> Metadata::booleans(std::string_view key) const {
  const MetadataEntry entry = require_array(key, "an array of bool");
  if (entry.element != ValueType::kBool) wrong_type(entry, "an array of bool");
  std::vector<bool> out(entry.count);
  for (uint64_t i = 0; i < entry.count; ++i) out[i] = entry.data[i] != std::byte{0};
  return out;
}

}  // namespace coreinfer
