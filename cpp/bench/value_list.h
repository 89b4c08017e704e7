// Values of one flag as llama-bench writes them: comma lists whose integer members may be ranges,
// "64-256", "64-256+64", "64-512*2". In: the flag's name and text. Out: numbers, or an Error
// (kValue) that names the flag. It knows no flag's meaning.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace coreinfer::bench {

// Members between separators; an empty member is an Error.
std::vector<std::string> split_list(std::string_view flag, std::string_view text, char separator);

// One decimal integer in [low, high].
int64_t parse_integer(std::string_view flag, std::string_view text, int64_t low, int64_t high);

// A size in bytes: a number, then nothing or KB, MB, GB (powers of 1000), KiB, MiB, GiB (of 1024).
uint64_t parse_bytes(std::string_view flag, std::string_view text);

// One finite decimal number, written with a point whatever the locale.
double parse_number(std::string_view flag, std::string_view text);

// first, first-last (step 1), first-last+step or first-last*factor, separated by commas; every
// value in [0, high]. `last` itself is included where the steps meet it.
std::vector<int64_t> parse_integers(std::string_view flag, std::string_view text, int64_t high);

std::vector<double> parse_numbers(std::string_view flag, std::string_view text);

}  // namespace coreinfer::bench
