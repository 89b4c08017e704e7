// text_drafts: what followed the last time the text stood where it stands now ("prompt lookup").
// In: the token ids so far. Out: n ids that followed the latest earlier occurrence of the longest
// repeated ending, or none.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace coreinfer {

std::vector<int32_t> text_drafts(std::span<const int32_t> tokens, int64_t n);

}  // namespace coreinfer
