// Matrix kernels with NEON and the dot-product instructions: the words that linear_simd.inc is made
// of, and what is not shared.
#include "kernels/linear.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstring>
#include <limits>

#include "kernels/linear_types.h"
#include "kernels/packed_format.h"
#include "tensor/blocks.h"

#pragma GCC push_options
// Named as an architecture: GCC 12 does not carry a bare "+dotprod" over to templates.
#pragma GCC target("arch=armv8.2-a+dotprod")

namespace coreinfer {
namespace {

// Vectors of 16 lanes: row r is lane r % 4 of part r / 4.
struct Floats {
  float32x4_t part[4];
};
struct Ints {
  int32x4_t part[4];
};
// [row][column], a byte each.
struct Codes {
  int8x16_t part[4];
};

// 32 registers: four sums a token, and as many accumulators that may wait in memory.
constexpr int kDotTokens = 4, kPairTokens = 1, kPanelTokens = 6, kRowTokens = 2, kRowPairTokens = 1;

inline Floats broadcast(float v) {
  const float32x4_t p = vdupq_n_f32(v);
  return {{p, p, p, p}};
}
inline Ints broadcast(int32_t v) {
  const int32x4_t p = vdupq_n_s32(v);
  return {{p, p, p, p}};
}
inline Floats load(const float* p) {
  return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}
inline void store(float* p, const Floats& v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.part[i]);
}
inline Floats add(const Floats& a, const Floats& b) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.part[i] = vaddq_f32(a.part[i], b.part[i]);
  return out;
}
inline Floats mul(const Floats& a, const Floats& b) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.part[i] = vmulq_f32(a.part[i], b.part[i]);
  return out;
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
  return out;
}
inline Floats to_floats(const Ints& v) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.part[i] = vcvtq_f32_s32(v.part[i]);
  return out;
}

// ---- Codes --------------------------------------------------------------------------------------

template <DType kType>
constexpr bool signed_codes() {
  return packed_format(kType).offset_log2 == 7;
}

inline const uint8_t* bytes(const std::byte* p) { return reinterpret_cast<const uint8_t*>(p); }

// Bytes [4][4] transposed.
inline uint8x16_t transpose4() {
  constexpr uint8_t kOrder[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vld1q_u8(kOrder);
}

// Lines of a plane as they lie in a whole step, [line][column], from a tail's [column][line].
// Columns past the tail hold whatever follows in memory: their activations are zero.
template <bool kTail>
inline uint8x16x2_t four_bit_lines(const std::byte* p) {
  const uint8x16x2_t v = {{vld1q_u8(bytes(p)), vld1q_u8(bytes(p) + 16)}};
  if constexpr (!kTail) return v;
  constexpr uint8_t kOrder[16] = {0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27};
  const uint8x16_t low = vld1q_u8(kOrder);
  return {{vqtbl2q_u8(v, low), vqtbl2q_u8(v, vaddq_u8(low, vdupq_n_u8(4)))}};
}

template <bool kTail>
inline uint8x16_t two_bit_lines(const std::byte* p) {
  const uint8x16_t v = vld1q_u8(bytes(p));
  return kTail ? vqtbl1q_u8(v, transpose4()) : v;
}

struct Bytes {
  uint8x16_t part[4];
};

// `value` in the bytes of the codes that have their bit set.
template <bool kTail>
inline Bytes one_bit_codes(const std::byte* p, uint8_t value) {
  uint8x8_t v = vld1_u8(bytes(p));
  if constexpr (kTail) {
    constexpr uint8_t kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    v = vtbl1_u8(v, vld1_u8(kOrder));
  }
  const uint8x16_t lines = vcombine_u8(v, v);
  constexpr uint8_t kBits[16] = {1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2};
  uint8x16_t bit = vld1q_u8(kBits);
  Bytes out;
  for (int i = 0; i < 4; ++i, bit = vshlq_n_u8(bit, 2)) {
    out.part[i] = vandq_u8(vtstq_u8(lines, bit), vdupq_n_u8(value));
  }
  return out;
}

inline Bytes eight_bit_tail(const std::byte* p) {
  const uint8x16_t a = vld1q_u8(bytes(p)), b = vld1q_u8(bytes(p) + 16);
  const uint8x16_t c = vld1q_u8(bytes(p) + 32), d = vld1q_u8(bytes(p) + 48);
  const uint16x8_t ab0 = vreinterpretq_u16_u8(vzip1q_u8(a, b));
  const uint16x8_t ab1 = vreinterpretq_u16_u8(vzip2q_u8(a, b));
  const uint16x8_t cd0 = vreinterpretq_u16_u8(vzip1q_u8(c, d));
  const uint16x8_t cd1 = vreinterpretq_u16_u8(vzip2q_u8(c, d));
  return {{vreinterpretq_u8_u16(vzip1q_u16(ab0, cd0)), vreinterpretq_u8_u16(vzip2q_u16(ab0, cd0)),
           vreinterpretq_u8_u16(vzip1q_u16(ab1, cd1)), vreinterpretq_u8_u16(vzip2q_u16(ab1, cd1))}};
}

inline Bytes either(const Bytes& a, const Bytes& b) {
  Bytes out;
  for (int i = 0; i < 4; ++i) out.part[i] = vorrq_u8(a.part[i], b.part[i]);
  return out;
}

template <bool kTail>
inline Bytes four_bits(const std::byte* p) {
  const uint8x16x2_t v = four_bit_lines<kTail>(p);
  const uint8x16_t mask = vdupq_n_u8(15);
  return {{vandq_u8(v.val[0], mask), vandq_u8(v.val[1], mask), vshrq_n_u8(v.val[0], 4),
           vshrq_n_u8(v.val[1], 4)}};
}

template <bool kTail>
inline Bytes two_bits(const std::byte* p) {
  const uint8x16_t v = two_bit_lines<kTail>(p), mask = vdupq_n_u8(3);
  return {{vandq_u8(v, mask), vandq_u8(vshrq_n_u8(v, 2), mask), vandq_u8(vshrq_n_u8(v, 4), mask),
           vshrq_n_u8(v, 6)}};
}

template <DType kType, bool kTail>
inline Bytes unsigned_codes(const std::byte* first, const std::byte* second) {
  constexpr PackedFormat f = packed_format(kType);
  if constexpr (f.bits == 8) {
    if constexpr (kTail) return eight_bit_tail(first);
    return {{vld1q_u8(bytes(first)), vld1q_u8(bytes(first) + 16), vld1q_u8(bytes(first) + 32),
             vld1q_u8(bytes(first) + 48)}};
  } else if constexpr (f.bits == 6) {
    Bytes high = two_bits<kTail>(second);
    for (int i = 0; i < 4; ++i) high.part[i] = vshlq_n_u8(high.part[i], 4);
    return either(four_bits<kTail>(first), high);
  } else if constexpr (f.bits == 5) {
    return either(four_bits<kTail>(first), one_bit_codes<kTail>(second, 16));
  } else if constexpr (f.bits == 4) {
    return four_bits<kTail>(first);
  } else if constexpr (f.bits == 3) {
    return either(two_bits<kTail>(first), one_bit_codes<kTail>(second, 4));
  } else {
    return two_bits<kTail>(first);
  }
}

// The codes of the step at `first` of the first plane and `second` of the second; 8-bit codes with
// their offset of 128 taken away.
template <DType kType, bool kTail>
inline Codes load_codes(const std::byte* first, const std::byte* second) {
  constexpr PackedFormat f = packed_format(kType);
  const Bytes v = unsigned_codes<kType, kTail>(first, second);
  Codes out;
  for (int i = 0; i < 4; ++i) {
    if constexpr (f.lookup) {
      out.part[i] = vqtbl1q_s8(vld1q_s8(kIQ4Values), v.part[i]);
    } else if constexpr (f.bits == 8) {
      out.part[i] = vreinterpretq_s8_u8(veorq_u8(v.part[i], vdupq_n_u8(0x80)));
    } else {
      out.part[i] = vreinterpretq_s8_u8(v.part[i]);
    }
  }
  return out;
}

template <DType kType, bool kTail, int S, int T>
inline void add_steps(const std::byte* const (&first)[S], const std::byte* const (&second)[S],
                      int n_steps, const int8_t* x, int64_t x_stride, Ints (&sum)[S][T]) {
  constexpr PackedFormat f = packed_format(kType);
  for (int i = 0; i < n_steps; ++i) {
    for (int s = 0; s < S; ++s) {
      const Codes codes = load_codes<kType, kTail>(first[s] + i * kStepCols * 2 * f.plane_bits(0),
                                                   second[s] + i * kStepCols * 2 * f.plane_bits(1));
      for (int t = 0; t < T; ++t) {
        int32_t four;
        std::memcpy(&four, x + i * kStepCols + t * x_stride, 4);
        const int8x16_t activations = vreinterpretq_s8_s32(vdupq_n_s32(four));
        for (int k = 0; k < 4; ++k) {
          sum[s][t].part[k] = vdotq_s32(sum[s][t].part[k], codes.part[k], activations);
        }
      }
    }
  }
}

template <DType kType>
inline Floats column(const Codes& codes, int c) {
  constexpr PackedFormat f = packed_format(kType);
  constexpr int kOffset = f.has_offset() && !signed_codes<kType>() ? 1 << f.offset_log2 : 0;
  Floats out;
  for (int i = 0; i < 4; ++i) {
    // Codes without a sign stay below 64, so that signed shifts serve all.
    const int32x4_t up = vshlq_s32(vreinterpretq_s32_s8(codes.part[i]), vdupq_n_s32(24 - 8 * c));
    out.part[i] = vcvtq_f32_s32(vsubq_s32(vshrq_n_s32(up, 24), vdupq_n_s32(kOffset)));
  }
  return out;
}

// ---- Scales -------------------------------------------------------------------------------------

// A weight of row r is scale[r] * (code - offset) + add[r]; add only where there is no offset.
struct Scales {
  Floats scale, add;
};

inline Floats load_halves(const std::byte* p) {
  Floats out;
  for (int i = 0; i < 4; ++i) {
    out.part[i] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes(p) + 8 * i)));
  }
  return out;
}

inline Floats from_bytes(const uint8x16_t& v) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_u8(vget_high_u8(v));
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
           vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
           vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}

inline Floats from_signed_bytes(const int8x16_t& v) {
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
           vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}

inline Floats negated(const Floats& v) {
  Floats out;
  for (int i = 0; i < 4; ++i) out.part[i] = vnegq_f32(v.part[i]);
  return out;
}

// `group` is where the group's scales stand, `super` where its super-block's do.
template <DType kType>
inline Scales load_scales(const std::byte* group, const std::byte* super) {
  constexpr PackedFormat f = packed_format(kType);
  if constexpr (f.scales == ScaleKind::kHalf) {
    return {load_halves(group), broadcast(0.0f)};
  } else if constexpr (f.scales == ScaleKind::kHalfPair) {
    return {load_halves(group), load_halves(group + 32)};
  } else {
    const uint8x16_t s = vld1q_u8(bytes(group));
    const Floats d = load_halves(super);
    if constexpr (f.scales == ScaleKind::kSuper) {
      return {mul(d, from_signed_bytes(vreinterpretq_s8_u8(s))), broadcast(0.0f)};
    } else if constexpr (f.scales == ScaleKind::kSuperPair) {
      const Floats m = from_bytes(vld1q_u8(bytes(group) + 16));
      return {mul(d, from_bytes(s)), negated(mul(load_halves(super + 32), m))};
    } else {
      const Floats m = from_bytes(vshrq_n_u8(s, 4));
      return {mul(d, from_bytes(vandq_u8(s, vdupq_n_u8(15)))),
              negated(mul(load_halves(super + 32), m))};
    }
  }
}

// ---- Float rows ---------------------------------------------------------------------------------

template <DType kType>
inline Floats load_row(const std::byte* p) {
  if constexpr (kType == DType::kF16) return load_halves(p);
  Floats out;
  for (int i = 0; i < 4; ++i) {
    if constexpr (kType == DType::kF32) {
      out.part[i] = vreinterpretq_f32_u8(vld1q_u8(bytes(p) + 16 * i));
    } else {
      const uint16x4_t half = vreinterpret_u16_u8(vld1_u8(bytes(p) + 8 * i));
      out.part[i] = vreinterpretq_f32_u32(vshll_n_u16(half, 16));
    }
  }
  return out;
}

inline float total(const Floats& low, const Floats& high) {
  const Floats s16 = add(low, high);
  const float32x4_t s4 =
      vaddq_f32(vaddq_f32(s16.part[0], s16.part[2]), vaddq_f32(s16.part[1], s16.part[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}

#include "kernels/linear_simd.inc"

void quantize(const ColumnGroups& columns, const float* x, const QuantizedRows& out) {
  constexpr float kSmallest = 1e-35f;  // as in linear_scalar.cpp
  const ColumnGroup* const groups = columns.groups.data();
  const auto n_groups = static_cast<int64_t>(columns.groups.size());
  for (int64_t p = 0; p < n_groups; ++p) {
    const int n = groups[p].n;
    float values[32] = {};
    std::memcpy(values, x + groups[p].first, static_cast<size_t>(n) * sizeof(float));
    uint32x4_t bits = vdupq_n_u32(0);
    for (int i = 0; i < 32; i += 4) {
      const uint32x4_t v = vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(values + i)));
      bits = vmaxq_u32(bits, v);
    }
    const uint32_t largest = vmaxvq_u32(bits);
    float magnitude;
    std::memcpy(&magnitude, &largest, 4);
    float scale = 0.0f, inverse = 0.0f;
    if (largest >= 0x7f800000u) {
      scale = std::numeric_limits<float>::quiet_NaN();
    } else if (magnitude >= kSmallest) {
      scale = magnitude / 127.0f;
      inverse = 127.0f / magnitude;
    }
    int8_t codes[32] = {};
    int32_t sum = 0;
    if (inverse != 0.0f) {
      int32x4_t sums = vdupq_n_s32(0);
      for (int i = 0; i < 32; i += 8) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i), inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i + 4), inverse));
        sums = vaddq_s32(sums, vaddq_s32(a, b));
        vst1_s8(codes + i, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
      }
      sum = vaddvq_s32(sums);
    }
    std::memcpy(out.codes + groups[p].padded, codes,
                static_cast<size_t>((n + kStepCols - 1) / kStepCols * kStepCols));
    out.scale[p] = scale;
    out.minus_sum[p] = -sum;
    out.scaled_sum[p] = scale * static_cast<float>(sum);
  }
}

template <DType kType>
void transpose_rows(const std::byte* rows, size_t row_stride, int64_t n_rows, int64_t begin,
                    int64_t end, float* panel) {
  constexpr auto kElement = static_cast<int64_t>(row_bytes(kType, 1));
  for (int64_t c = begin; c < end; c += 16) {
    const int64_t n = end - c < 16 ? end - c : 16;
    float values[kStripRows][16] = {};
    for (int64_t r = 0; r < n_rows; ++r) {
      std::byte weights[16 * kElement] = {};
      std::memcpy(weights, rows + row_stride * static_cast<size_t>(r) + c * kElement,
                  static_cast<size_t>(n * kElement));
      store(values[r], load_row<kType>(weights));
    }
    for (int64_t j = 0; j < n; ++j) {
      for (int r = 0; r < kStripRows; ++r) panel[(c - begin + j) * kStripRows + r] = values[r][j];
    }
  }
}

void transpose_panel(DType type, const std::byte* rows, size_t row_stride, int64_t n_rows,
                     int64_t begin, int64_t end, float* panel) {
  switch (type) {
    case DType::kF16:
      return transpose_rows<DType::kF16>(rows, row_stride, n_rows, begin, end, panel);
    case DType::kBF16:
      return transpose_rows<DType::kBF16>(rows, row_stride, n_rows, begin, end, panel);
    default:
      return transpose_rows<DType::kF32>(rows, row_stride, n_rows, begin, end, panel);
  }
}

}  // namespace
#pragma GCC pop_options

const LinearKernels& linear_kernels_neon() {
  static constexpr LinearKernels kTable = {
      .quantize = quantize,
      .dot_strips = find_dot_strips,
      .unpack_panel = find_unpack_panel,
      .transpose_panel = transpose_panel,
      .dot_panel = dot_panel,
      .dot_rows = find_dot_rows,
      .columns_panel = find_columns_panel,
      .add_columns = find_add_columns,
  };
  return kTable;
}

}  // namespace coreinfer

#endif
