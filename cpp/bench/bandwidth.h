// Read bandwidth of this machine's memory: the ceiling of decoding, which reads all weights for
// each token. In: threads and bytes. Out: how fast all threads together read that memory now. It is
// measured around every repetition, since on a shared machine it changes within seconds, and in a
// child process, so that its memory is not part of the peak that rows report.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace coreinfer::bench {

struct ReadBandwidth {
  double gb_per_s = 0.0;  // 10^9 bytes; 0: not measured
  uint64_t bytes = 0;     // that each pass read
};

// Bytes to read: `wanted`, or half of what the system has to give where that is less.
uint64_t bandwidth_bytes(uint64_t wanted);

class BandwidthMeter {
 public:
  // To be made while this process has no other threads.
  explicit BandwidthMeter(uint64_t bytes);
  ~BandwidthMeter();
  BandwidthMeter(const BandwidthMeter&) = delete;
  BandwidthMeter& operator=(const BandwidthMeter&) = delete;

  // Of one pass over the memory by n_threads; 0 where the child failed (out of memory).
  double pass_seconds(int n_threads);
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_;
  pid_t child_ = -1;
  int socket_ = -1;
};

}  // namespace coreinfer::bench
