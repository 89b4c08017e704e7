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
  std::vector<std::byte> bytes;
  const auto take = [&](uint64_t at, uint64_t n) {
    bytes.resize(n);
    file.read_at(start + at, bytes.data(), n);
    state = hash_bytes(bytes, state);
  };
  if (data_bytes <= kSamples * kSampleBytes) {
    take(0, data_bytes);
  } else {
    const uint64_t step = (data_bytes - kSampleBytes) / (kSamples - 1);
    for (uint64_t i = 0; i + 1 < kSamples; ++i) take(i * step, kSampleBytes);
    take(data_bytes - kSampleBytes, kSampleBytes);
  }
  return state;
}

}  // namespace coreinfer
