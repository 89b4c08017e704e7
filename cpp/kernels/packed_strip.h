// Inside packing only: one strip's worth of work, and the table of functions that do it, compiled
// once plainly and once for AVX2 from the same text (packed_source.inc, packed_strip.inc), and once
// for AVX-512 from its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/isa.h"
#include "kernels/packed_format.h"
#include "kernels/packed_plan.h"
#include "tensor/dtype.h"

namespace coreinfer {

// How the groups and columns of a file's row map to those of the packed matrix.
struct ColumnMap {
  const ColumnGroup* groups = nullptr;     // packed order
  const int32_t* packed_groups = nullptr;  // per group of the file: its packed position, or -1
  // Of picked columns only (all null where every column is kept):
  const int32_t* picks = nullptr;       // ascending columns of the file
  const int32_t* first_pick = nullptr;  // per 256 columns of the file, and one more at the end
};

struct StripJob {
  ColumnMap map;
  const std::vector<StripPlan>* plans = nullptr;  // for AVX-512
  int64_t cols = 0;                               // of a row in the file
  const std::byte* rows[kStripRows] = {};         // null: a row of zeros
  const std::byte* next[kStripRows] = {};  // rows that will be packed then, to be fetched; or null
  const PackedView* to = nullptr;
  std::byte* strip = nullptr;
};

// Asks for bytes [begin, end) of this strip's rows, or, past their end, of the next's: 16 rows are
// more streams than a CPU foresees by itself, and picked ones end soon.
inline void fetch_ahead(const StripJob& job, int64_t begin, int64_t end, int64_t row_bytes) {
  const std::byte* const* rows = job.rows;
  if (begin >= row_bytes) {
    begin -= row_bytes;
    end -= row_bytes;
    rows = job.next;
  }
  for (int r = 0; r < kStripRows; ++r) {
    if (rows[r] == nullptr) continue;
    for (int64_t at = begin; at < end; at += 64) __builtin_prefetch(rows[r] + at);
  }
}

using PackStripFn = void (*)(const StripJob& job);

// The functions for a quantised type; the second and third fall back to null without x86-64.
PackStripFn pack_strip_plain(DType type);
PackStripFn pack_strip_avx2(DType type);
PackStripFn pack_strip_avx512(DType type);  // needs VBMI, too

}  // namespace coreinfer
