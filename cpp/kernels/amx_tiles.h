// What the kernels on AMX tiles share: eight tiles of 16 rows of 64 bytes, and the order of memory
// accesses around them. A build for tests may say in COREINFER_EMULATED_AMX which header has the
// tile instructions as functions, so that these kernels run where the CPU has none.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#if defined(COREINFER_EMULATED_AMX)
#include COREINFER_EMULATED_AMX
#endif

namespace coreinfer {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// GCC 12 believes that only the first bytes of a configuration are read, and that tile loads read
// no memory; without the barriers it drops or moves the stores before them.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

inline void configure_tiles() {
  const TileConfig config;
  compiler_barrier();
#if defined(COREINFER_EMULATED_AMX)
  _tile_loadconfig(&config);
#else
  asm volatile("ldtilecfg %0" ::"m"(config));
#endif
}

}  // namespace coreinfer

#endif
