// Mat: a non-owning, typed view of a weight matrix (or vector: rows == 1) in GGUF's row layout.
// Row r holds `cols` elements at data + r * row_bytes(type, cols), packed in GGUF blocks.
// The owner (a mapped file or a buffer) must outlive the view; copying a Mat copies no weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace coreinfer {

struct Mat {
  DType type = DType::kF32;
  int64_t rows = 0;  // GGUF ne[1]: outputs of a linear map
  int64_t cols = 0;  // GGUF ne[0]: inputs of a linear map
  const std::byte* data = nullptr;

  bool empty() const { return data == nullptr; }
  size_t stride() const { return row_bytes(type, cols); }
  size_t bytes() const { return stride() * static_cast<size_t>(rows); }
  Mat slice(int64_t first, int64_t n) const { return {type, n, cols, row(first)}; }  // rows
  const std::byte* row(int64_t r) const { return data + static_cast<size_t>(r) * stride(); }
};

}  // namespace coreinfer
