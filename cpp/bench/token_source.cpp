#include "bench/token_source.h"

#include <cctype>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <random>
#include <string_view>

#include "base/error.h"
#include "bench/value_list.h"

namespace coreinfer::bench {
namespace {

// Ids between white space, or a JSON list of them: brackets around all, commas between. In the
// first form a tab ends what is read of a line, so that `coreinfer tokenize` can write the file.
std::vector<int32_t> read_ids(const std::string& path) {
  if (std::filesystem::is_directory(path)) {
    throw_error(ErrorKind::kIo, "cannot read the token file %s: it is a folder", path.c_str());
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) throw_error(ErrorKind::kIo, "cannot read the token file %s", path.c_str());
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  const auto trim = [&](std::string_view& s) {
    while (!s.empty() && is_space(s.front())) s.remove_prefix(1);
    while (!s.empty() && is_space(s.back())) s.remove_suffix(1);
  };
  std::string_view rest = text;
  trim(rest);
  if (!rest.empty() && rest.front() == '{') {
    throw_error(ErrorKind::kValue,
                "token file %s holds a JSON object, expected a list of ids or what `coreinfer "
                "tokenize` without --json prints",
                path.c_str());
  }
  const bool json = !rest.empty() && rest.front() == '[';
  if (json) {
    if (rest.back() != ']') {
      throw_error(ErrorKind::kValue, "token file %s: the list has no closing \"]\"", path.c_str());
    }
    rest = rest.substr(1, rest.size() - 2);
    trim(rest);
  }
  const std::string where = "token file " + path;
  std::vector<int32_t> ids;
  while (!rest.empty()) {
    size_t end = 0;
    while (end < rest.size() && (json ? rest[end] != ',' : !is_space(rest[end]))) ++end;
    std::string_view word = rest.substr(0, end);
    if (json && end + 1 == rest.size()) word = {};  // a comma with nothing after it
    trim(word);
    ids.push_back(
        static_cast<int32_t>(parse_integer(where, word, 0, std::numeric_limits<int32_t>::max())));
    if (!json && end < rest.size() && rest[end] == '\t') end = rest.find('\n', end);
    rest.remove_prefix(std::min(rest.size(), json ? end + 1 : end));
    trim(rest);
  }
  if (ids.empty()) throw_error(ErrorKind::kValue, "token file %s has no ids", path.c_str());
  return ids;
}

}  // namespace

TokenSource::TokenSource(const std::string& path, uint64_t seed) : path_(path), seed_(seed) {
  if (!path.empty()) ids_ = read_ids(path);
}

void TokenSource::require(int64_t n) const {
  if (path_.empty() || n <= static_cast<int64_t>(ids_.size())) return;
  throw_error(ErrorKind::kValue, "token file %s has %zu ids, but a test needs %lld", path_.c_str(),
              ids_.size(), static_cast<long long>(n));
}

std::vector<int32_t> TokenSource::first(int64_t n, int64_t n_vocab) const {
  if (path_.empty()) {
    std::mt19937_64 random(seed_);
    std::vector<int32_t> ids(static_cast<size_t>(n));
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint64_t>(n_vocab));
    return ids;
  }
  require(n);
  std::vector<int32_t> ids(ids_.begin(), ids_.begin() + n);
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < n_vocab) continue;
    throw_error(ErrorKind::kValue, "token file %s: id %d at position %zu, expected less than %lld",
                path_.c_str(), ids[i], i, static_cast<long long>(n_vocab));
  }
  return ids;
}

}  // namespace coreinfer::bench
