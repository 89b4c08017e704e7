#include "kernels/packed_source.h"

#include <cstring>

#include "tensor/blocks.h"

namespace coreinfer {
namespace {

// The loops below have fixed lengths and no branches, so that compilers make vector code of them.

// 32 codes of 4 bits: low halves first.
void low_high(const uint8_t* qs, uint8_t* codes) {
  for (int j = 0; j < 16; ++j) codes[j] = qs[j] & 15;
  for (int j = 0; j < 16; ++j) codes[j + 16] = qs[j] >> 4;
}

// Adds bit i of qh to code i as its fifth bit.
void add_fifth_bits(const uint8_t (&qh)[4], uint8_t* codes) {
  constexpr uint64_t kSpread = 0x8040201008040201u;  // byte i keeps bit i
  for (int b = 0; b < 4; ++b) {
    const uint64_t bits = (qh[b] * 0x0101010101010101u) & kSpread;
    // Any set bit of a byte carries into its top bit, then moves to bit 4.
    const uint64_t top = ((bits + 0x7f7f7f7f7f7f7f7fu) | bits) & 0x8080808080808080u;
    uint64_t eight;
    std::memcpy(&eight, codes + 8 * b, 8);
    eight |= top >> 3;
    std::memcpy(codes + 8 * b, &eight, 8);
  }
}

void take_apart(const BlockQ4_0& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  low_high(b.qs, out->codes + 32 * i);
}

void take_apart(const BlockQ4_1& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  out->m[i] = b.m;
  low_high(b.qs, out->codes + 32 * i);
}

void take_apart(const BlockQ5_0& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  low_high(b.qs, out->codes + 32 * i);
  add_fifth_bits(b.qh, out->codes + 32 * i);
}

void take_apart(const BlockQ5_1& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  out->m[i] = b.m;
  low_high(b.qs, out->codes + 32 * i);
  add_fifth_bits(b.qh, out->codes + 32 * i);
}

void take_apart(const BlockQ8_0& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  for (int j = 0; j < 32; ++j) {
    out->codes[32 * i + j] = static_cast<uint8_t>(static_cast<uint8_t>(b.qs[j]) ^ 0x80);
  }
}

void take_apart(const BlockIQ4_NL& b, int i, SourceBlock* out) {
  out->d[i] = b.d;
  low_high(b.qs, out->codes + 32 * i);
}

// 2-bit fields: 32 bytes hold 128 elements.
void two_bits(const uint8_t* qs, uint8_t* codes) {
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 4; ++k) {
      for (int j = 0; j < 32; ++j) {
        codes[128 * half + 32 * k + j] = (qs[32 * half + j] >> (2 * k)) & 3;
      }
    }
  }
}

void take_apart(const BlockQ2_K& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  out->m[0] = b.dmin;
  for (int g = 0; g < 16; ++g) {
    out->scale[g] = static_cast<int8_t>(b.scales[g] & 15);
    out->minimum[g] = b.scales[g] >> 4;
  }
  two_bits(b.qs, out->codes);
}

void take_apart(const BlockQ3_K& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  for (int g = 0; g < 16; ++g) {
    const int low = g < 8 ? b.scales[g] & 15 : b.scales[g - 8] >> 4;
    const int high = (b.scales[8 + g % 4] >> (2 * (g / 4))) & 3;
    out->scale[g] = static_cast<int8_t>((low | (high << 4)) - 32);
  }
  two_bits(b.qs, out->codes);
  for (int k = 0; k < 8; ++k) {
    for (int j = 0; j < 32; ++j) {
      out->codes[32 * k + j] |= static_cast<uint8_t>(((b.hmask[j] >> k) & 1) << 2);
    }
  }
}

// The 6-bit scales and minima of Q4_K and Q5_K.
void scales_and_minima(const uint8_t (&s)[12], SourceBlock* out) {
  for (int g = 0; g < 4; ++g) {
    out->scale[g] = static_cast<int8_t>(s[g] & 63);
    out->minimum[g] = s[g + 4] & 63;
    out->scale[g + 4] = static_cast<int8_t>((s[g + 8] & 15) | ((s[g] >> 6) << 4));
    out->minimum[g + 4] = static_cast<uint8_t>((s[g + 8] >> 4) | ((s[g + 4] >> 6) << 4));
  }
}

// 4-bit fields: 32 bytes hold 64 elements.
void four_bits(const uint8_t* qs, uint8_t* codes) {
  for (int part = 0; part < 4; ++part) {
    for (int j = 0; j < 32; ++j) codes[64 * part + j] = qs[32 * part + j] & 15;
    for (int j = 0; j < 32; ++j) codes[64 * part + 32 + j] = qs[32 * part + j] >> 4;
  }
}

void take_apart(const BlockQ4_K& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  out->m[0] = b.dmin;
  scales_and_minima(b.scales, out);
  four_bits(b.qs, out->codes);
}

void take_apart(const BlockQ5_K& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  out->m[0] = b.dmin;
  scales_and_minima(b.scales, out);
  four_bits(b.qs, out->codes);
  for (int g = 0; g < 8; ++g) {
    for (int j = 0; j < 32; ++j) {
      out->codes[32 * g + j] |= static_cast<uint8_t>(((b.qh[j] >> g) & 1) << 4);
    }
  }
}

void take_apart(const BlockQ6_K& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  std::memcpy(out->scale, b.scales, 16);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* ql = b.ql + 64 * half;
    const uint8_t* qh = b.qh + 32 * half;
    uint8_t* codes = out->codes + 128 * half;
    for (int j = 0; j < 32; ++j) {
      codes[j] = static_cast<uint8_t>((ql[j] & 15) | ((qh[j] << 4) & 0x30));
      codes[32 + j] = static_cast<uint8_t>((ql[32 + j] & 15) | ((qh[j] << 2) & 0x30));
      codes[64 + j] = static_cast<uint8_t>((ql[j] >> 4) | (qh[j] & 0x30));
      codes[96 + j] = static_cast<uint8_t>((ql[32 + j] >> 4) | ((qh[j] >> 2) & 0x30));
    }
  }
}

void take_apart(const BlockIQ4_XS& b, int, SourceBlock* out) {
  out->d[0] = b.d;
  for (int g = 0; g < 8; ++g) {
    const int low = (b.scales_l[g / 2] >> (4 * (g % 2))) & 15;
    const int high = (b.scales_h >> (2 * g)) & 3;
    out->scale[g] = static_cast<int8_t>((low | (high << 4)) - 32);
    low_high(b.qs + 16 * g, out->codes + 32 * g);
  }
}

template <class Block, int kElements>
void read_blocks(const std::byte* src, int n, SourceBlock* out) {
  for (int i = 0; i < n / kElements; ++i) {
    Block block;
    std::memcpy(&block, src + sizeof(Block) * static_cast<size_t>(i), sizeof block);
    take_apart(block, i, out);
  }
}

}  // namespace

ReadBlockFn find_read_block(DType type) {
  switch (type) {
    case DType::kQ4_0:
      return read_blocks<BlockQ4_0, 32>;
    case DType::kQ4_1:
      return read_blocks<BlockQ4_1, 32>;
    case DType::kQ5_0:
      return read_blocks<BlockQ5_0, 32>;
    case DType::kQ5_1:
      return read_blocks<BlockQ5_1, 32>;
    case DType::kQ8_0:
      return read_blocks<BlockQ8_0, 32>;
    case DType::kQ2_K:
      return read_blocks<BlockQ2_K, 256>;
    case DType::kQ3_K:
      return read_blocks<BlockQ3_K, 256>;
    case DType::kQ4_K:
      return read_blocks<BlockQ4_K, 256>;
    case DType::kQ5_K:
      return read_blocks<BlockQ5_K, 256>;
    case DType::kQ6_K:
      return read_blocks<BlockQ6_K, 256>;
    case DType::kIQ4_NL:
      return read_blocks<BlockIQ4_NL, 32>;
    case DType::kIQ4_XS:
      return read_blocks<BlockIQ4_XS, 256>;
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      break;
  }
  return nullptr;
}

}  // namespace coreinfer
