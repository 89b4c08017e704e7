// Unpacking of packed_format.h with AVX-512: 4 columns of 16 rows become the 64 bytes [row][column]
// that vpdpbusd takes. Included by the AVX-512 kernels inside their target region and anonymous
// namespace, after <immintrin.h>; it holds nothing else.

// Bytes [4][4] of each 128-bit lane transposed.
inline __m128i transpose4() {
  return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

// Lines of a plane as they lie in a whole step, [line][column], from a tail's [column][line].
// Columns past the tail hold whatever follows in memory: their activations are zero.
inline __m256i tail_lines4(const std::byte* p) {
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(v, order),
                             _mm256_broadcastsi128_si256(transpose4()));
}

inline __m512i tail_lines8(const std::byte* p) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(order, _mm512_loadu_si512(p)),
                             _mm512_broadcast_i32x4(transpose4()));
}

template <bool kTail>
inline __m512i four_bit_lines(const std::byte* p) {
  if constexpr (kTail) return _mm512_broadcast_i64x4(tail_lines4(p));
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <bool kTail>
inline __m512i two_bit_lines(const std::byte* p) {
  __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (kTail) v = _mm_shuffle_epi8(v, transpose4());
  return _mm512_broadcast_i32x4(v);
}

// Which of the 64 codes have their bit set.
template <bool kTail>
inline __mmask64 one_bit_lines(const std::byte* p) {
  __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (kTail) {
    v = _mm_shuffle_epi8(v, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0));
  }
  constexpr int k0 = 0x01010101;
  const __m512i bit = _mm512_setr_epi32(
      k0, k0, k0 << 1, k0 << 1, k0 << 2, k0 << 2, k0 << 3, k0 << 3, k0 << 4, k0 << 4, k0 << 5,
      k0 << 5, k0 << 6, k0 << 6, static_cast<int>(0x80808080u), static_cast<int>(0x80808080u));
  return _mm512_test_epi8_mask(_mm512_broadcastq_epi64(v), bit);
}

inline __m512i four_bit_shift() {
  return _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
}

inline __m512i two_bit_shift() {
  return _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
}

// The codes of the step at `first` of the first plane and `second` of the second.
template <DType kType, bool kTail>
inline __m512i load_codes(const std::byte* first, const std::byte* second) {
  constexpr PackedFormat f = packed_format(kType);
  if constexpr (f.bits == 8) {
    return kTail ? tail_lines8(first) : _mm512_loadu_si512(first);
  } else if constexpr (f.bits == 4 || f.bits == 5) {
    __m512i v = _mm512_srlv_epi32(four_bit_lines<kTail>(first), four_bit_shift());
    v = _mm512_and_si512(v, _mm512_set1_epi8(15));
    if constexpr (f.lookup) {
      const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIQ4Codes));
      v = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), v);
    }
    if constexpr (f.bits == 5) {
      v = _mm512_mask_add_epi8(v, one_bit_lines<kTail>(second), v, _mm512_set1_epi8(16));
    }
    return v;
  } else if constexpr (f.bits == 6) {
    const __m512i low = _mm512_srlv_epi32(four_bit_lines<kTail>(first), four_bit_shift());
    // Bits 4 and 5 of each byte: what crosses from byte to byte is masked away.
    const __m512i high =
        _mm512_rolv_epi32(two_bit_lines<kTail>(second),
                          _mm512_setr_epi32(4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0, 30, 30, 30, 30));
    constexpr int kSelect = 0xca;  // low where the mask is set, else high
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, high, kSelect);
    return _mm512_and_si512(both, _mm512_set1_epi8(63));
  } else {
    __m512i v = _mm512_srlv_epi32(two_bit_lines<kTail>(first), two_bit_shift());
    v = _mm512_and_si512(v, _mm512_set1_epi8(3));
    if constexpr (f.bits == 3) {
      v = _mm512_mask_add_epi8(v, one_bit_lines<kTail>(second), v, _mm512_set1_epi8(4));
    }
    return v;
  }
}

// A weight of row r is scale[r] * (code - offset) + add[r]; add only where there is no offset.
struct Scales {
  __m512 scale;
  __m512 add;
};

inline __m512 load_halves(const std::byte* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m128i load16(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

inline __m512 negated(__m512 v) {
  return _mm512_castsi512_ps(
      _mm512_xor_si512(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(0x80000000u))));
}

// `group` is where the group's scales stand, `super` where its super-block's do.
template <DType kType>
inline Scales load_scales(const std::byte* group, const std::byte* super) {
  constexpr PackedFormat f = packed_format(kType);
  if constexpr (f.scales == ScaleKind::kHalf) {
    return {load_halves(group), _mm512_setzero_ps()};
  } else if constexpr (f.scales == ScaleKind::kHalfPair) {
    return {load_halves(group), load_halves(group + 32)};
  } else if constexpr (f.scales == ScaleKind::kSuper) {
    const __m512 s = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(group)));
    return {_mm512_mul_ps(load_halves(super), s), _mm512_setzero_ps()};
  } else {
    __m512i s, m;
    if constexpr (f.scales == ScaleKind::kSuperPair) {
      s = _mm512_cvtepu8_epi32(load16(group));
      m = _mm512_cvtepu8_epi32(load16(group + 16));
    } else {
      const __m512i both = _mm512_cvtepu8_epi32(load16(group));
      s = _mm512_and_si512(both, _mm512_set1_epi32(15));
      m = _mm512_srli_epi32(both, 4);
    }
    const __m512 minimum = _mm512_mul_ps(load_halves(super + 32), _mm512_cvtepi32_ps(m));
    return {_mm512_mul_ps(load_halves(super), _mm512_cvtepi32_ps(s)), negated(minimum)};
  }
}
