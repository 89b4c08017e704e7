// The plain kernels: the definition in code of what the others compute.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/half.h"
#include "kernels/dequantize.h"
#include "kernels/linear.h"
#include "kernels/linear_types.h"
#include "kernels/packed_read.h"

namespace coreinfer {
namespace {

// Below this a group counts as zero: 127 / magnitude must stay finite.
constexpr float kSmallest = 1e-35f;

void quantize(const ColumnGroups& columns, const float* x, const QuantizedRows& out) {
  for (size_t p = 0; p < columns.groups.size(); ++p) {
    const ColumnGroup& group = columns.groups[p];
    const float* const values = x + group.first;
    int8_t* const codes = out.codes + group.padded;
    // As integers, the bits of NaN are above those of Inf and these above all numbers'.
    uint32_t largest = 0;
    for (int c = 0; c < group.n; ++c) {
      largest = std::max(largest, std::bit_cast<uint32_t>(values[c]) & 0x7fffffffu);
    }
    const int padded = (group.n + kStepCols - 1) / kStepCols * kStepCols;
    std::fill(codes, codes + padded, int8_t{0});
    out.scale[p] = 0.0f;
    out.minus_sum[p] = 0;
    if (largest >= 0x7f800000u) {
      out.scale[p] = std::numeric_limits<float>::quiet_NaN();
    } else if (const float magnitude = std::bit_cast<float>(largest); magnitude >= kSmallest) {
      out.scale[p] = magnitude / 127.0f;
      const float inverse = 127.0f / magnitude;
      int32_t sum = 0;
      for (int c = 0; c < group.n; ++c) {
        codes[c] = static_cast<int8_t>(std::nearbyintf(values[c] * inverse));
        sum += codes[c];
      }
      out.minus_sum[p] = -sum;
    }
    out.scaled_sum[p] = out.scale[p] * static_cast<float>(-out.minus_sum[p]);
  }
}

void dot_strip(const StripProduct& product, const QuantizedRows& x, int64_t n_tokens) {
  const PackedView& w = *product.matrix;
  float* const tile = product.tile;
  const PackedFormat f = packed_format(w.type);
  const std::byte* const strip = w.strip(product.strip);
  const auto& groups = w.columns->groups;
  std::fill(tile, tile + n_tokens * kStripRows, 0.0f);
  for (size_t p = 0; p < groups.size(); ++p) {
    const ColumnGroup& group = groups[p];
    const GroupScales scales = read_scales(w, strip, static_cast<int64_t>(p));
    const std::byte* const codes = strip + w.codes_offset + group.before * f.column_bytes();
    for (int r = 0; r < kStripRows; ++r) {
      int row[32];
      for (int c = 0; c < group.n; ++c) row[c] = read_code(f, codes, group.n, r, c);
      for (int64_t t = 0; t < n_tokens; ++t) {
        const QuantizedRows token = x.from(t);
        int32_t sum = f.has_offset() ? token.minus_sum[p] * (1 << f.offset_log2) : 0;
        for (int c = 0; c < group.n; ++c) sum += row[c] * token.codes[group.padded + c];
        float& y = tile[t * kStripRows + r];
        y = std::fma(static_cast<float>(sum), scales.scale[r] * token.scale[p], y);
        if (!f.has_offset()) y = std::fma(scales.add[r], token.scaled_sum[p], y);
      }
    }
  }
}

void dot_strips(std::span<const StripProduct> strips, const QuantizedRows& x, int64_t n_tokens) {
  for (const StripProduct& product : strips) dot_strip(product, x, n_tokens);
}

void unpack_panel(const PackedView& w, int64_t s, int64_t begin, int64_t end, float* panel) {
  const PackedFormat f = packed_format(w.type);
  const std::byte* const strip = w.strip(s);
  const int offset = f.has_offset() ? 1 << f.offset_log2 : 0;
  for (int64_t p = begin; p < end; ++p) {
    const ColumnGroup& group = w.columns->groups[static_cast<size_t>(p)];
    const GroupScales scales = read_scales(w, strip, p);
    const std::byte* const codes = strip + w.codes_offset + group.before * f.column_bytes();
    for (int c = 0; c < group.n; ++c) {
      for (int r = 0; r < kStripRows; ++r) {
        const auto code = static_cast<float>(read_code(f, codes, group.n, r, c) - offset);
        *panel++ = scales.scale[r] * code + scales.add[r];
      }
    }
  }
}

void transpose_panel(DType type, const std::byte* rows, size_t row_stride, int64_t n_rows,
                     int64_t begin, int64_t end, float* panel) {
  constexpr int64_t kChunk = 64;
  float values[kChunk];
  const size_t element = row_bytes(type, 1);
  std::fill(panel, panel + (end - begin) * kStripRows, 0.0f);
  for (int64_t r = 0; r < n_rows; ++r) {
    const std::byte* const row = rows + row_stride * static_cast<size_t>(r);
    for (int64_t c = begin; c < end; c += kChunk) {
      const int64_t n = std::min(kChunk, end - c);
      dequantize_row(type, row + element * static_cast<size_t>(c), values, n);
      for (int64_t j = 0; j < n; ++j) panel[(c - begin + j) * kStripRows + r] = values[j];
    }
  }
}

void dot_panel(const float* panel, int64_t n_cols, const FloatRows& x, int64_t n_tokens,
               float* tile) {
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* const token = x.data + t * x.stride;
    float* const y = tile + t * kStripRows;
    for (int64_t c = 0; c < n_cols; ++c) {
      for (int r = 0; r < kStripRows; ++r)
        y[r] = std::fma(panel[c * kStripRows + r], token[c], y[r]);
    }
  }
}

template <DType kType>
void dot_row(const std::byte* row, int64_t n, const FloatRows& x, int64_t n_tokens, float* tile) {
  constexpr int64_t kSums = 32;
  const size_t element = row_bytes(kType, 1);
  for (int64_t t = 0; t < n_tokens; ++t) {
    const float* const token = x.data + t * x.stride;
    float sums[kSums] = {};
    float values[kSums];
    for (int64_t c = 0; c < n; c += kSums) {
      const int64_t count = std::min(kSums, n - c);
      dequantize_row(kType, row + element * static_cast<size_t>(c), values, count);
      for (int64_t j = 0; j < count; ++j) sums[j] = std::fma(values[j], token[c + j], sums[j]);
    }
    for (int64_t half = kSums / 2; half > 0; half /= 2) {
      for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    tile[t * kStripRows] = sums[0];
  }
}

template <DType kType>
void dot_rows(std::span<const RowsProduct> products, size_t row_stride, int64_t n,
              const FloatRows& x, int64_t n_tokens) {
  for (const RowsProduct& p : products) {
    for (int64_t r = 0; r < p.n_rows; ++r) {
      dot_row<kType>(p.first + row_stride * static_cast<size_t>(r), n, x, n_tokens, p.tile + r);
    }
  }
}

template <DType kType>
void columns_panel(const std::byte* first, size_t stride, int64_t n_cols, float* panel) {
  for (int64_t c = 0; c < n_cols; ++c) {
    dequantize_row(kType, first + stride * static_cast<size_t>(c), panel + c * kStripRows,
                   kStripRows);
  }
}

template <DType kType>
void add_columns(const std::byte* first, size_t stride, const int32_t* columns, const float* x,
                 int64_t n, int64_t n_rows, float* y) {
  float values[kStripRows];
  for (int64_t i = 0; i < n; ++i) {
    const std::byte* const column = first + stride * static_cast<size_t>(columns[i]);
    for (int64_t r = 0; r < n_rows; ++r) {
      if (r % kStripRows == 0) {
        dequantize_row(kType, column + row_bytes(kType, r), values, kStripRows);
      }
      y[r] = std::fma(values[r % kStripRows], x[i], y[r]);
    }
  }
}

}  // namespace

const LinearKernels& linear_kernels_scalar() {
  static constexpr LinearKernels kTable = {
      .quantize = quantize,
      .dot_strips = [](DType, bool) -> DotStripsFn { return dot_strips; },
      .unpack_panel = [](DType) -> UnpackPanelFn { return unpack_panel; },
      .transpose_panel = transpose_panel,
      .dot_panel = dot_panel,
      .dot_rows =
          [](DType type) {
            return for_float_type(type, []<DType kType>() -> DotRowsFn { return dot_rows<kType>; });
          },
      .columns_panel =
          [](DType type) {
            return for_float_type(
                type, []<DType kType>() -> ColumnsPanelFn { return columns_panel<kType>; });
          },
      .add_columns =
          [](DType type) {
            return for_float_type(type,
                                  []<DType kType>() -> AddColumnsFn { return add_columns<kType>; });
          },
  };
  return kTable;
}

}  // namespace coreinfer
