#include "bench/value_list.h"

#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>
#include <utility>

#include "base/error.h"

namespace coreinfer::bench {
namespace {

constexpr size_t kMaxValues = 10000;  // of one flag; more is a slip in a range

[[noreturn]] void malformed(std::string_view flag, std::string_view text, const char* expected) {
  throw_error(ErrorKind::kValue, "%.*s: \"%.*s\" is not %s", static_cast<int>(flag.size()),
              flag.data(), static_cast<int>(text.size()), text.data(), expected);
}

void add_range(std::string_view flag, std::string_view member, int64_t high,
               std::vector<int64_t>& values) {
  const size_t dash = member.find('-', 1);
  if (dash == std::string_view::npos) {
    values.push_back(parse_integer(flag, member, 0, high));
    return;
  }
  const int64_t first = parse_integer(flag, member.substr(0, dash), 0, high);
  const size_t op = member.find_first_of("+*", dash);
  const size_t last_length = op == std::string_view::npos ? op : op - dash - 1;
  const int64_t last = parse_integer(flag, member.substr(dash + 1, last_length), 0, high);
  const bool multiplies = op != std::string_view::npos && member[op] == '*';
  const int64_t step =
      op == std::string_view::npos ? 1 : parse_integer(flag, member.substr(op + 1), 0, high);
  if (last < first) malformed(flag, member, "a range: its end lies before its start");
  if (multiplies ? step < 2 || first == 0 : step < 1) {
    malformed(flag, member, "a range that grows (+step of 1 or more, *factor of 2 or more)");
  }
  for (int64_t v = first; v <= last;) {
    if (values.size() == kMaxValues) malformed(flag, member, "a range of at most 10000 values");
    values.push_back(v);
    if (multiplies ? v > last / step : v > last - step) break;
    v = multiplies ? v * step : v + step;
  }
}

}  // namespace

std::vector<std::string> split_list(std::string_view flag, std::string_view text, char separator) {
  std::vector<std::string> members;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    if (end == begin) malformed(flag, text, "a list: it has an empty member");
    members.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return members;
}

int64_t parse_integer(std::string_view flag, std::string_view text, int64_t low, int64_t high) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, value);
  if (text.empty() || result.ec == std::errc::invalid_argument || result.ptr != end) {
    malformed(flag, text, "a whole number");
  }
  if (result.ec == std::errc::result_out_of_range || value < low || value > high) {
    throw_error(ErrorKind::kValue, "%.*s is %.*s, expected %lld to %lld",
                static_cast<int>(flag.size()), flag.data(), static_cast<int>(text.size()),
                text.data(), static_cast<long long>(low), static_cast<long long>(high));
  }
  return value;
}

double parse_number(std::string_view flag, std::string_view text) {
  std::istringstream stream{std::string(text)};
  stream.imbue(std::locale::classic());
  double value = 0.0;
  if (!(stream >> std::noskipws >> value) || stream.peek() != EOF || !std::isfinite(value)) {
    malformed(flag, text, "a number");
  }
  return value;
}

uint64_t parse_bytes(std::string_view flag, std::string_view text) {
  constexpr std::pair<std::string_view, double> kUnits[] = {
      {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}};
  std::string_view digits = text;
  double unit = 1.0;
  for (const auto& [name, bytes] : kUnits) {
    if (!text.ends_with(name)) continue;
    digits.remove_suffix(name.size());
    unit = bytes;
    break;
  }
  constexpr const char* kExpected = "a size in bytes, for example 2GiB or 500MB";
  if (digits.find_first_not_of("0123456789.") != digits.npos) malformed(flag, text, kExpected);
  const double bytes = parse_number(flag, digits) * unit;
  if (bytes >= 1.0 && bytes < 0x1p62) return static_cast<uint64_t>(bytes);
  malformed(flag, text, kExpected);
}

std::vector<int64_t> parse_integers(std::string_view flag, std::string_view text, int64_t high) {
  std::vector<int64_t> values;
  for (const std::string& member : split_list(flag, text, ',')) {
    add_range(flag, member, high, values);
  }
  return values;
}

std::vector<double> parse_numbers(std::string_view flag, std::string_view text) {
  std::vector<double> values;
  for (const std::string& member : split_list(flag, text, ',')) {
    values.push_back(parse_number(flag, member));
  }
  return values;
}

}  // namespace coreinfer::bench
