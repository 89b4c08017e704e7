// Where the codes of a strip stand in the rows of the file and where they go, worked out once a
// matrix: every row has its codes in the same places. In: a type and the columns to be packed. Out:
// tables for byte permutes of 64-byte vectors (packed_pack_avx512.cpp). It reads no weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/packed_format.h"
#include "tensor/dtype.h"

namespace coreinfer {

// Up to 64 bytes out of a row, from `n_windows` pieces of 64 bytes that start at `base`.
struct ByteFetch {
  static constexpr int kMaxWindows = 5;
  alignas(64) uint8_t index[64] = {};  // of each byte in its window
  uint64_t take[kMaxWindows] = {};     // bytes that come from this window
  uint64_t last = 0;                   // bytes of the last window that may be read
  int64_t base = 0;                    // bytes from the row's start
  int n_windows = 0;
};

// Up to 4 columns of one group: where the planes of their codes go, in bytes from the strip's
// codes.
struct StepTarget {
  int32_t plane[2] = {};
  int32_t n = 0;  // columns; 0: none
};

// 16 steps at once. Step i has 4 entries, from 4 * slot(i) on; entries past a step's columns repeat
// its first.
struct StepsPlan {
  static constexpr int kSteps = 16;
  // Turning rows into steps makes columns of a 4 by 4 square of its rows.
  static constexpr int slot(int step) { return step % 4 * 4 + step / 4; }
  ByteFetch low, high;                    // bytes with the codes' low bits, and with those above
  uint64_t low_by_2 = 0, low_by_4 = 0;    // entries whose low bits are to be shifted down by 2, 4
  uint64_t high_by_2 = 0, high_by_4 = 0;  // the same of two high bits
  alignas(64) uint8_t high_bit[64] = {};  // which bit, where there is one high bit
  StepTarget steps[kSteps];
  bool whole = false;                      // groups with all their columns
  int64_t ahead_begin = 0, ahead_end = 0;  // bytes of a row to be asked for now; past its end, of
                                           // the next strip's
};

// The scales of up to 8 groups of a type without super-blocks: their d, then (16 bytes on) their m.
struct ScalesPlan {
  static constexpr int kGroups = 8;
  ByteFetch fetch;
  int32_t to[kGroups] = {};  // in bytes from the strip's scales
  int n = 0;
};

// What is done `repeat` times along the rows, each time so many bytes further.
struct StripPlan {
  std::vector<StepsPlan> steps;
  std::vector<ScalesPlan> scales;
  int64_t repeat = 1;
  int64_t row_step = 0, codes_step = 0, scales_step = 0;
};

// Plans that follow one another: all columns take one for each 256 and one for the rest; picked
// columns take one.
std::vector<StripPlan> plan_strip(DType type, int64_t cols, const ColumnGroups& columns);

}  // namespace coreinfer
