// The AMX tile instructions that the kernels use, as functions: for tests on CPUs without AMX
// (COREINFER_EMULATED_AMX). They do what Intel documents (Software Developer's Manual, volume 2), a
// value for a value; where the instruction would fault they say why and abort. Each thread has its
// own tiles. What no emulation shows: memory accesses that a compiler moves across the intrinsics.
#pragma once

#include <immintrin.h>  // its names, which the macros below take

#include <cstddef>

namespace coreinfer::emulated_amx {

// 64 bytes: palette 1, or 0, which releases the tiles.
void load_config(const void* config);
void release();
void zero(int tile);
void load(int tile, const void* from, ptrdiff_t stride);
void store(int tile, void* to, ptrdiff_t stride);
// dst += a b. In float32, to nearest even, subnormal inputs and results as zeros: first two sums
// over the dwords k, of the products of even and of odd elements, from zero on with one fused
// multiply-add each; then even + odd; then dst + that.
void dot_bf16(int dst, int a, int b);

}  // namespace coreinfer::emulated_amx

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ::coreinfer::emulated_amx::load_config(config)
#define _tile_release() ::coreinfer::emulated_amx::release()
#define _tile_zero(tile) ::coreinfer::emulated_amx::zero(tile)
#define _tile_loadd(tile, from, stride) ::coreinfer::emulated_amx::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::coreinfer::emulated_amx::store(tile, to, stride)
#define _tile_dpbf16ps(dst, a, b) ::coreinfer::emulated_amx::dot_bf16(dst, a, b)
