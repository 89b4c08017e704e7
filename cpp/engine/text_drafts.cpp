#include "engine/text_drafts.h"

namespace coreinfer {
namespace {

constexpr size_t kLongest = 8;   // tokens of an ending that are compared
constexpr size_t kShortest = 3;  // that must repeat

}  // namespace

std::vector<int32_t> text_drafts(std::span<const int32_t> tokens, int64_t n) {
  size_t longest = kShortest - 1;
  size_t follows = 0;
  for (size_t end = tokens.empty() ? 0 : tokens.size() - 1; end >= kShortest; --end) {
    size_t same = 0;
    while (same < kLongest && same < end &&
           tokens[end - 1 - same] == tokens[tokens.size() - 1 - same]) {
      ++same;
    }
    if (same > longest) {
      longest = same;
      follows = end;
      if (same == kLongest) break;
    }
  }
  if (follows == 0) return {};
  // Where the text repeats itself to its very end, it is expected to go on doing so.
  std::vector<int32_t> drafts;
  for (size_t i = follows; drafts.size() < static_cast<size_t>(n); ++i) {
    drafts.push_back(i < tokens.size() ? tokens[i] : drafts[i - tokens.size()]);
  }
  return drafts;
}

}  // namespace coreinfer
