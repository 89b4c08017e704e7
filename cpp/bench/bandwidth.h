// Read bandwidth of this machine's memory: the ceiling of decoding, which reads all weights for
// each token. In: threads and bytes. Out: the best of 8 read-only sums over that memory by all
// threads. It runs in a child process, so that its memory is not part of the peak that rows report.
#pragma once

#include <cstdint>

namespace coreinfer::bench {

struct ReadBandwidth {
  double gb_per_s = 0.0;  // 10^9 bytes; 0: not measured
  uint64_t bytes = 0;     // that each sum read
};

// Bytes to read: `wanted`, or half of what the system has to give where that is less.
uint64_t bandwidth_bytes(uint64_t wanted);

// To be called while this process has no other threads. A child that fails (out of memory) is a
// result of 0.
ReadBandwidth measure_read_bandwidth(int n_threads, uint64_t bytes);

}  // namespace coreinfer::bench
