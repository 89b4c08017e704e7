// A stable 64-bit hash for telling files apart (not cryptographic): the same on every machine and
// in every version, since sidecar files carry it. In: bytes. Out: a number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/mmap_file.h"

namespace coreinfer {

uint64_t hash_bytes(std::span<const std::byte> bytes, uint64_t seed);

// Size, and 16 pages of 4 KiB at even distances from `start` to the end of the file, the first and
// the last among them; everything where that is no more.
uint64_t hash_sampled_pages(const MmapFile& file, uint64_t start, uint64_t seed);

}  // namespace coreinfer
