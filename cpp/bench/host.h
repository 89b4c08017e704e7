// What is known of the machine and of this build, for the columns that every row repeats.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace coreinfer::bench {

struct BuildInfo {
  const char* version;  // "0.1.0"
  const char* commit;   // of the source when the build was configured, or "unknown"
  int64_t number;       // commits up to it, or 0
};
BuildInfo build_info();

// Why figures of this build say little (assertions, no optimisation, sanitizers); mostly empty.
std::vector<std::string> build_warnings();

// The CPU's name as the system gives it; "unknown" where it does not.
std::string cpu_name();

// One line for each device that can compute, with the instruction sets of the CPU.
std::vector<std::string> devices();

// Peak resident memory, counted from the last reset where the system can do that (Linux), else
// from the start of the process.
void reset_peak_rss();
uint64_t peak_rss();

// Now in UTC as ISO 8601, "2026-01-31T23:59:59Z".
std::string utc_now();

}  // namespace coreinfer::bench
