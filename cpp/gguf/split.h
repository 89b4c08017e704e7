// Names of the files of a split model: PREFIX-00001-of-00003.gguf. In: the path a user gave.
// Out: the paths of all parts, beside the first; nothing in a file takes part in making them.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace coreinfer {

struct SplitName {
  std::string prefix;  // with folder
  int number = 0;      // 1 … count
  int count = 0;

  std::string path(int part_number) const;
};

// Nothing when the path does not end in -NNNNN-of-NNNNN.gguf with 1 <= number <= count.
std::optional<SplitName> parse_split_name(std::string_view path);

}  // namespace coreinfer
