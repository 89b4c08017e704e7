// What the command line can say: the text of --help, and why a flag of llama-bench is not taken.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace coreinfer::bench {

std::string usage();

// A flag of llama-bench that would set nothing here.
struct Meaningless {
  const char* why;
  bool harmless;  // the value asks for what is done anyway
};
// Nothing for any other word. `value` may be a list: harmless when all its members are.
std::optional<Meaningless> meaningless(std::string_view flag, std::string_view value);

}  // namespace coreinfer::bench
