#include "gguf/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace coreinfer {
namespace {

constexpr uint64_t kSamples = 16;
constexpr uint64_t kSampleBytes = 4096;

// One step: mixes 64 bits in, so that every input bit reaches every state bit.
uint64_t mix(uint64_t state, uint64_t word) {
  state ^= word;
  state ^= state >> 32;
  state *= 0xd6e8feb86659fd93u;
  state ^= state >> 32;
  state *= 0xd6e8feb86659fd93u;
  state ^= state >> 32;
  return state;
}

}  // namespace

uint64_t hash_bytes(std::span<const std::byte> bytes, uint64_t seed) {
  uint64_t state = mix(seed, bytes.size());
  for (size_t i = 0; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<size_t>(8, bytes.size() - i));
    state = mix(state, word);
  }
  return state;
}

uint64_t hash_sampled_pages(const MmapFile& file, uint64_t start, uint64_t seed) {
  uint64_t state = mix(seed, file.size());
  const uint64_t data_bytes = file.size() - start;
  const uint64_t step = std::max(kSampleBytes, data_bytes / kSamples);
  std::vector<std::byte> page(kSampleBytes);
  for (uint64_t at = 0; at < data_bytes; at += step) {
    page.resize(std::min(kSampleBytes, data_bytes - at));
    file.read_at(start + at, page.data(), page.size());
    state = hash_bytes(page, state);
  }
  return state;
}

}  // namespace coreinfer
