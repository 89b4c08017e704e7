// Which instruction sets this process may run: the CPU is asked and so is the operating system
// (which registers it saves; permission for AMX tiles). Kernels are chosen from the answer at run
// time. Nothing here computes.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace coreinfer {

enum class Isa {
  kScalar,      // plain C++; the reference for all others
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // AVX-512 F, BW, VL, DQ, VNNI
  kAvx512Bf16,  // kAvx512 and products of bf16 pairs
  kAmx,         // kAvx512Bf16 and AMX tiles with bf16
  kNeon,        // AArch64 with the dot-product instructions
};

// "scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon": what COREINFER_ISA accepts.
std::string_view isa_name(Isa isa);

// Whether the set holds kAvx512.
constexpr bool has_avx512(Isa isa) {
  return isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16 || isa == Isa::kAmx;
}

// Everything that this process can run, plainest first; kScalar is always there.
const std::vector<Isa>& available_isas();

// The names of available_isas(), "scalar, avx2", for messages.
std::string available_isa_names();

// The best available set, or the one that the environment variable COREINFER_ISA names. Throws
// kValue when that is unknown or cannot run here.
Isa best_isa();

// The available set of that name; throws kValue as best_isa() does.
Isa find_isa(std::string_view name);

// AVX-512 VBMI (byte permutes), asked beside kAvx512.
bool has_avx512_vbmi();

// Whether weights are best prefetched at once to the first-level cache: so on AMD's CPUs, where a
// prefetch to the second level takes a core's time (Zen 5: 58 -> 67 GB/s of 84 with Q4_0).
bool fetches_directly();

}  // namespace coreinfer
