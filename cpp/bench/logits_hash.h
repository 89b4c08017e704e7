// LogitsHash: one number for all logits that a test produced. Equal runs give equal hashes, so two
// repetitions that differ show a race, and two builds that differ show a changed result.
// It runs between decode steps: about 16 bytes a cycle, short enough that no thread falls asleep.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <span>

namespace coreinfer::bench {

class LogitsHash {
 public:
  void add(std::span<const float> logits) {
    size_t i = 0;
    for (; i + kStep <= logits.size(); i += kStep) step(&logits[i]);
    std::array<float, kStep> tail{};
    std::memcpy(tail.data(), logits.data() + i, (logits.size() - i) * sizeof(float));
    step(tail.data());
  }
  uint64_t value() const {
    uint64_t all = 0;
    for (const uint64_t lane : lanes_) all = mix(all ^ lane);
    return all;
  }

 private:
  static constexpr size_t kLanes = 8;  // independent, so that multiplications overlap
  static constexpr size_t kStep = kLanes * sizeof(uint64_t) / sizeof(float);

  // A change of one input always changes the lane: both operations can be undone.
  void step(const float* from) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      uint64_t word;
      std::memcpy(&word, from + 2 * lane, sizeof(word));
      const uint64_t h = lanes_[lane];
      lanes_[lane] = (((h << 27) | (h >> 37)) ^ word) * 0x9e3779b97f4a7c15u;
    }
  }
  static uint64_t mix(uint64_t h) {
    h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 32);
  }

  std::array<uint64_t, kLanes> lanes_ = {1, 2, 3, 4, 5, 6, 7, 8};
};

}  // namespace coreinfer::bench
