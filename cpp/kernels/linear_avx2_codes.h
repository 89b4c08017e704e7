// Unpacking of packed_format.h with AVX2: 4 columns of 16 rows become two vectors [row][column],
// one byte a code. Included by the AVX2 kernels inside their target region and anonymous namespace,
// after <immintrin.h>; it holds nothing else.

struct Codes {
  __m256i low;   // rows 0-7
  __m256i high;  // rows 8-15
};

// 8-bit codes come signed, with their offset of 128 taken away: vpmaddubsw would saturate on them
// as unsigned ones.
template <DType kType>
constexpr bool signed_codes() {
  return packed_format(kType).offset_log2 == 7;
}

// Bytes [4][4] of each 128-bit lane transposed.
inline __m128i transpose4() {
  return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

inline __m128i load16(const std::byte* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

inline __m256i load32(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// Lines of a plane as they lie in a whole step, [line][column], from a tail's [column][line].
// Columns past the tail hold whatever follows in memory: their activations are zero.
template <bool kTail>
inline __m256i four_bit_lines(const std::byte* p) {
  if constexpr (!kTail) return load32(p);
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(load32(p), order),
                             _mm256_broadcastsi128_si256(transpose4()));
}

template <bool kTail>
inline __m256i two_bit_lines(const std::byte* p) {
  const __m128i v = load16(p);
  return _mm256_broadcastsi128_si256(kTail ? _mm_shuffle_epi8(v, transpose4()) : v);
}

// `value` in the bytes of the codes that have their bit set.
template <bool kTail>
inline Codes one_bit_codes(const std::byte* p, char value) {
  __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (kTail) {
    v = _mm_shuffle_epi8(v, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0));
  }
  const __m256i lines = _mm256_broadcastq_epi64(v);
  constexpr int k0 = 0x01010101, k7 = static_cast<int>(0x80808080u);
  const __m256i low =
      _mm256_setr_epi32(k0, k0, k0 << 1, k0 << 1, k0 << 2, k0 << 2, k0 << 3, k0 << 3);
  const __m256i high =
      _mm256_setr_epi32(k0 << 4, k0 << 4, k0 << 5, k0 << 5, k0 << 6, k0 << 6, k7, k7);
  const __m256i values = _mm256_set1_epi8(value);
  return {_mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(lines, low), low), values),
          _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(lines, high), high), values)};
}

inline Codes eight_bit_tail(const std::byte* p) {
  const __m128i a = load16(p), b = load16(p + 16), c = load16(p + 32), d = load16(p + 48);
  const __m128i ab0 = _mm_unpacklo_epi8(a, b), ab1 = _mm_unpackhi_epi8(a, b);
  const __m128i cd0 = _mm_unpacklo_epi8(c, d), cd1 = _mm_unpackhi_epi8(c, d);
  return {_mm256_set_m128i(_mm_unpackhi_epi16(ab0, cd0), _mm_unpacklo_epi16(ab0, cd0)),
          _mm256_set_m128i(_mm_unpackhi_epi16(ab1, cd1), _mm_unpacklo_epi16(ab1, cd1))};
}

inline Codes either(const Codes& a, const Codes& b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}

// The codes of the step at `first` of the first plane and `second` of the second.
template <DType kType, bool kTail>
inline Codes load_codes(const std::byte* first, const std::byte* second) {
  constexpr PackedFormat f = packed_format(kType);
  if constexpr (f.bits == 8) {
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    const Codes v = kTail ? eight_bit_tail(first) : Codes{load32(first), load32(first + 32)};
    return {_mm256_xor_si256(v.low, flip), _mm256_xor_si256(v.high, flip)};
  } else if constexpr (f.bits >= 4) {
    const __m256i lines = four_bit_lines<kTail>(first);
    const __m256i mask = _mm256_set1_epi8(15);
    const Codes v{_mm256_and_si256(lines, mask),
                  _mm256_and_si256(_mm256_srli_epi16(lines, 4), mask)};
    if constexpr (f.lookup) {
      const __m256i table = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(kIQ4Values)));
      return {_mm256_shuffle_epi8(table, v.low), _mm256_shuffle_epi8(table, v.high)};
    } else if constexpr (f.bits == 5) {
      return either(v, one_bit_codes<kTail>(second, 16));
    } else if constexpr (f.bits == 6) {
      // Bits 4 and 5 of each byte: what crosses from byte to byte is masked away.
      const __m256i two = two_bit_lines<kTail>(second), bits = _mm256_set1_epi8(0x30);
      const __m256i left = _mm256_setr_epi32(4, 4, 4, 4, 2, 2, 2, 2);
      const __m256i right = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
      return either(v, {_mm256_and_si256(_mm256_sllv_epi32(two, left), bits),
                        _mm256_and_si256(_mm256_srlv_epi32(two, right), bits)});
    } else {
      return v;
    }
  } else {
    const __m256i two = two_bit_lines<kTail>(first), mask = _mm256_set1_epi8(3);
    const __m256i low = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
    const __m256i high = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6);
    const Codes v{_mm256_and_si256(_mm256_srlv_epi32(two, low), mask),
                  _mm256_and_si256(_mm256_srlv_epi32(two, high), mask)};
    if constexpr (f.bits == 3) return either(v, one_bit_codes<kTail>(second, 4));
    return v;
  }
}

// A weight of row r is scale[r] * (code - offset) + add[r]; add only where there is no offset.
struct Scales {
  __m256 scale[2];  // rows 0-7, 8-15
  __m256 add[2];
};

inline __m256 load_halves(const std::byte* p) { return _mm256_cvtph_ps(load16(p)); }

inline __m256 load_unsigned(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

inline __m256 load_signed(const std::byte* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// `group` is where the group's scales stand, `super` where its super-block's do.
template <DType kType>
inline Scales load_scales(const std::byte* group, const std::byte* super) {
  constexpr PackedFormat f = packed_format(kType);
  Scales out;
  for (int i = 0; i < 2; ++i) {
    if constexpr (!f.has_super()) {
      out.scale[i] = load_halves(group + 16 * i);
    } else if constexpr (f.scales == ScaleKind::kSuperNibbles) {
      const __m256i both =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(group + 8 * i)));
      const __m256 s = _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)));
      out.scale[i] = _mm256_mul_ps(load_halves(super + 16 * i), s);
      out.add[i] = _mm256_mul_ps(load_halves(super + 32 + 16 * i),
                                 _mm256_cvtepi32_ps(_mm256_srli_epi32(both, 4)));
    } else {
      out.scale[i] = _mm256_mul_ps(load_halves(super + 16 * i), load_signed(group + 8 * i));
    }
    if constexpr (f.scales == ScaleKind::kHalfPair) {
      out.add[i] = load_halves(group + 32 + 16 * i);
    } else if constexpr (f.has_offset()) {
      out.add[i] = _mm256_setzero_ps();
    } else {
      if constexpr (f.scales == ScaleKind::kSuperPair) {
        out.add[i] =
            _mm256_mul_ps(load_halves(super + 32 + 16 * i), load_unsigned(group + 16 + 8 * i));
      }
      out.add[i] = _mm256_xor_ps(out.add[i], _mm256_set1_ps(-0.0f));
    }
  }
  return out;
}
