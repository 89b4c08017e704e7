#include "kernels/isa.h"

#include <cstdint>
#include <cstdlib>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace coreinfer {
namespace {

constexpr Isa kAllIsas[] = {Isa::kScalar,     Isa::kAvx2, Isa::kAvx512,
                            Isa::kAvx512Bf16, Isa::kAmx,  Isa::kNeon};

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_vbmi = false;
  bool avx512_bf16 = false;
  bool amx = false;
  bool neon = false;
  bool amd = false;
};

#if defined(__x86_64__)

constexpr bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }

// The register sets that the operating system saves on a context switch.
uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux hands out the 8 KiB of tile state only to processes that ask for it.
bool request_amx_permission() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

#if defined(COREINFER_EMULATED_AMX)
constexpr bool kTilesEmulated = true;  // a build for tests: see amx_tiles.h
#else
constexpr bool kTilesEmulated = false;
#endif

Features detect() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return f;
  f.amd = b == signature_AMD_ebx && d == signature_AMD_edx && c == signature_AMD_ecx;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx) return f;
  const uint64_t saved = saved_registers();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  uint32_t a7, b7, c7, d7;
  if ((saved & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a7, &b7, &c7, &d7)) return f;
  f.avx2 = bit(b7, 5) && fma && f16c;
  f.avx512 = f.avx2 && (saved & kZmm) == kZmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) &&
             bit(b7, 31) && bit(c7, 11);
  f.avx512_vbmi = f.avx512 && bit(c7, 1);
  uint32_t a71, b71, c71, d71;
  f.avx512_bf16 = f.avx512 && __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71) && bit(a71, 5);
  const bool tiles = kTilesEmulated || ((saved & kTiles) == kTiles && bit(d7, 22) && bit(d7, 24) &&
                                        request_amx_permission());
  f.amx = f.avx512_bf16 && tiles;
  return f;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
  constexpr unsigned long kHwcapAsimdDotProduct = 1ul << 20;
  Features f;
  f.neon = (getauxval(AT_HWCAP) & kHwcapAsimdDotProduct) != 0;
  return f;
}

#elif defined(__aarch64__) && defined(__APPLE__)

Features detect() {
  Features f;
  f.neon = true;  // every Apple silicon CPU has the dot product
  return f;
}

#else

Features detect() { return {}; }

#endif

const Features& features() {
  static const Features detected = detect();
  return detected;
}

bool runs(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return features().avx2;
    case Isa::kAvx512:
      return features().avx512;
    case Isa::kAvx512Bf16:
      return features().avx512_bf16;
    case Isa::kAmx:
      return features().amx;
    case Isa::kNeon:
      return features().neon;
  }
  return false;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    case Isa::kNeon:
      return "neon";
  }
  return "unknown";
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> available = [] {
    std::vector<Isa> isas;
    for (Isa isa : kAllIsas) {
      if (runs(isa)) isas.push_back(isa);
    }
    return isas;
  }();
  return available;
}

std::string available_isa_names() {
  std::string names;
  for (Isa isa : available_isas()) {
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  return names;
}

Isa find_isa(std::string_view name) {
  for (Isa isa : kAllIsas) {
    if (isa_name(isa) != name) continue;
    if (runs(isa)) return isa;
    throw_error(ErrorKind::kValue,
                "instruction set '%.*s' cannot run on this machine; use one of %s",
                static_cast<int>(name.size()), name.data(), available_isa_names().c_str());
  }
  throw_error(ErrorKind::kValue, "unknown instruction set '%.*s'; this machine can run %s",
              static_cast<int>(name.size()), name.data(), available_isa_names().c_str());
}

Isa best_isa() {
  const char* forced = std::getenv("COREINFER_ISA");
  if (forced == nullptr || *forced == '\0') return available_isas().back();
  try {
    return find_isa(forced);
  } catch (const Error& error) {
    throw Error(error.kind(), std::string("COREINFER_ISA: ") + error.what());
  }
}

bool has_avx512_vbmi() { return features().avx512_vbmi; }

bool fetches_directly() { return features().amd; }

}  // namespace coreinfer
