#include "gguf/split.h"

#include "base/error.h"

namespace coreinfer {
namespace {

constexpr std::string_view kPattern = "-00000-of-00000.gguf";  // 0 stands for any digit

int number_at(std::string_view text, size_t at) {
  int n = 0;
  for (const char c : text.substr(at, 5)) n = 10 * n + (c - '0');
  return n;
}

}  // namespace

std::string SplitName::path(int part_number) const {
  return prefix + format_string("-%05d-of-%05d.gguf", part_number, count);
}

std::optional<SplitName> parse_split_name(std::string_view path) {
  if (path.size() < kPattern.size()) return std::nullopt;
  const std::string_view tail = path.substr(path.size() - kPattern.size());
  for (size_t i = 0; i < tail.size(); ++i) {
    const bool fits =
        kPattern[i] == '0' ? tail[i] >= '0' && tail[i] <= '9' : tail[i] == kPattern[i];
    if (!fits) return std::nullopt;
  }
  SplitName name;
  name.prefix = std::string(path.substr(0, path.size() - kPattern.size()));
  name.number = number_at(tail, 1);
  name.count = number_at(tail, 10);
  if (name.number < 1 || name.number > name.count) return std::nullopt;
  return name;
}

}  // namespace coreinfer
