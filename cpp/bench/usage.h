// What the command line can say: the text of --help, and why a flag of llama-bench is not taken.
#pragma once

#include <string>
#include <string_view>

namespace coreinfer::bench {

std::string usage();

// Why a flag that llama-bench has would set nothing here; nullptr for any other word.
const char* why_meaningless(std::string_view flag);

}  // namespace coreinfer::bench
