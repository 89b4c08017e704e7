// Plain scalar dequantisation: packed blocks of any supported type -> float32. It is the reference
// that every faster kernel is compared with, so the order of float32 operations is fixed: it is
// that of the format's own definition (blocks.h), one rounding each, no fused multiply-add.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace coreinfer {

// dst[0 … n) from row_bytes(type, n) bytes at src, of any alignment. n must be a multiple of the
// type's block size (kValue otherwise).
void dequantize_row(DType type, const std::byte* src, float* dst, int64_t n);

}  // namespace coreinfer
