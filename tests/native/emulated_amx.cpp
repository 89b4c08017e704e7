// Before the header: GCC 12 warns that '__Y' is used uninitialised inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "emulated_amx.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f")

namespace coreinfer::emulated_amx {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

struct Tile {
  alignas(64) std::byte bytes[kMaxRows][kMaxRowBytes];
  int rows;
  int row_bytes;
};

struct State {
  bool configured = false;
  Tile tiles[kTiles] = {};
};

thread_local State state;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulated AMX: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  va_end(arguments);
  std::abort();
}

Tile& configured(const char* instruction, int tile) {
  if (tile < 0 || tile >= kTiles) {
    fault("%s of tile %d, expected 0 to %d", instruction, tile, kTiles - 1);
  }
  if (!state.configured) {
    fault("%s of tile %d before tiles were configured in this thread", instruction, tile);
  }
  Tile& t = state.tiles[tile];
  if (t.rows == 0) fault("%s of tile %d, which the configuration leaves out", instruction, tile);
  return t;
}

// MXCSR of the tile unit while in scope: to nearest even, no exceptions, subnormals are zero. The
// flags that arithmetic raises go with it.
class TileRounding {
 public:
  TileRounding() : before_(_mm_getcsr()) { _mm_setcsr(0x9fc0); }
  ~TileRounding() { _mm_setcsr(before_); }
  TileRounding(const TileRounding&) = delete;
  TileRounding& operator=(const TileRounding&) = delete;

 private:
  unsigned before_;
};

}  // namespace

void load_config(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  if (bytes[0] == 0) return release();
  if (bytes[0] != 1) fault("palette %d, expected 0 or 1", bytes[0]);
  if (bytes[1] != 0) fault("start row %d: resumed loads are not emulated, expected 0", bytes[1]);
  // Bytes 2 to 15, row bytes of tiles 8 to 15, rows of these.
  for (int i = 2; i < 64; ++i) {
    const bool used = (i >= 16 && i < 32) || (i >= 48 && i < 56);
    if (!used && bytes[i] != 0) fault("reserved byte %d of the configuration is %d", i, bytes[i]);
  }
  State next;
  for (int i = 0; i < kTiles; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof row_bytes);
    const int rows = bytes[48 + i];
    if (rows > kMaxRows || row_bytes > kMaxRowBytes || (rows == 0) != (row_bytes == 0)) {
      fault("configuration of tile %d: %d rows of %d bytes, expected 1 to %d of 1 to %d, or 0 of 0",
            i, rows, row_bytes, kMaxRows, kMaxRowBytes);
    }
    next.tiles[i].rows = rows;
    next.tiles[i].row_bytes = row_bytes;
  }
  next.configured = true;
  state = next;
}

void release() { state = {}; }

void zero(int tile) {
  Tile& t = configured("TILEZERO", tile);
  std::memset(t.bytes, 0, sizeof t.bytes);
}

void load(int tile, const void* from, ptrdiff_t stride) {
  Tile& t = configured("TILELOADD", tile);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.bytes[r], static_cast<const std::byte*>(from) + r * stride,
                static_cast<size_t>(t.row_bytes));
  }
}

void store(int tile, void* to, ptrdiff_t stride) {
  const Tile& t = configured("TILESTORED", tile);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(static_cast<std::byte*>(to) + r * stride, t.bytes[r],
                static_cast<size_t>(t.row_bytes));
  }
}

void dot_bf16(int dst, int a, int b) {
  Tile& c = configured("TDPBF16PS", dst);
  const Tile& left = configured("TDPBF16PS", a);
  const Tile& right = configured("TDPBF16PS", b);
  if (dst == a || dst == b || a == b) {
    fault("TDPBF16PS of tiles %d, %d and %d, expected three", dst, a, b);
  }
  if (c.rows != left.rows || c.row_bytes != right.row_bytes || left.row_bytes / 4 != right.rows ||
      c.row_bytes % 4 != 0 || left.row_bytes % 4 != 0) {
    fault(
        "TDPBF16PS of %d rows of %d bytes += %d of %d times %d of %d: the shapes do not fit, or a "
        "row is not of whole dwords",
        c.rows, c.row_bytes, left.rows, left.row_bytes, right.rows, right.row_bytes);
  }
  // The compiler knows nothing of MXCSR: the empty instructions keep what is computed under it
  // between the constructor and the destructor.
  const TileRounding rounding;
  const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < right.rows; ++k) {
      int32_t pair;
      std::memcpy(&pair, left.bytes[m] + 4 * k, sizeof pair);
      asm volatile("" : "+r"(pair));
      const __m512i x = _mm512_set1_epi32(pair), y = _mm512_load_si512(right.bytes[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, odd_half)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, odd_half)), odd);
    }
    asm volatile("" : "+v"(even), "+v"(odd));
    __m512 sum = _mm512_add_ps(_mm512_load_ps(c.bytes[m]), _mm512_add_ps(even, odd));
    asm volatile("" : "+v"(sum));
    _mm512_store_ps(c.bytes[m], sum);
  }
}

}  // namespace coreinfer::emulated_amx
#pragma GCC pop_options
