#include "bench/bandwidth.h"

#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <string>

#include "base/aligned_buffer.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace coreinfer::bench {
namespace {

constexpr int64_t kChunkWords = int64_t{1} << 19;  // 4 MiB, dealt to whichever thread is free

// Sum of words [begin, end). How wide the loads are decides the rate on some processors: with 64
// bytes, a whole cache line each, more lines are on their way at once than with 16.
[[gnu::always_inline]] inline uint64_t sum_words_inline(const uint64_t* words, int64_t begin,
                                                        int64_t end) {
  using Line [[gnu::vector_size(64)]] = uint64_t;
  constexpr int64_t kLineWords = 8;
  constexpr int64_t kLines = 4;
  Line sums[kLines] = {};
  int64_t i = begin;
  for (; i + kLines * kLineWords <= end; i += kLines * kLineWords) {
    for (int64_t line = 0; line < kLines; ++line) {
      Line loaded;
      std::memcpy(&loaded, words + i + line * kLineWords, sizeof(loaded));
      sums[line] += loaded;
    }
  }
  uint64_t sum = 0;
  for (; i < end; ++i) sum += words[i];
  for (const Line& line : sums) {
    for (int64_t word = 0; word < kLineWords; ++word) sum += line[word];
  }
  return sum;
}

using SumWordsFn = uint64_t (*)(const uint64_t* words, int64_t begin, int64_t end);

uint64_t sum_words(const uint64_t* words, int64_t begin, int64_t end) {
  return sum_words_inline(words, begin, end);
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] uint64_t sum_words_avx2(const uint64_t* words, int64_t begin, int64_t end) {
  return sum_words_inline(words, begin, end);
}

[[gnu::target("avx512f")]] uint64_t sum_words_avx512(const uint64_t* words, int64_t begin,
                                                     int64_t end) {
  return sum_words_inline(words, begin, end);
}
#endif

// The widest loads that this processor has, whatever the kernels are limited to: the ceiling is the
// machine's.
SumWordsFn widest_sum_words() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return sum_words_avx512;
  if (__builtin_cpu_supports("avx2")) return sum_words_avx2;
#endif
  return sum_words;
}

// What the child does: waits for numbers of threads, answers each with the seconds of a pass.
class Reader {
 public:
  explicit Reader(uint64_t bytes)
      : n_words_(static_cast<int64_t>(bytes / sizeof(uint64_t))), buffer_(bytes) {}

  double seconds(int n_threads) {
    if (!pool_ || pool_->n_threads() != n_threads) pool_.emplace(n_threads);
    if (!written_) write();
    const auto* const words = buffer_.as<uint64_t>();
    const SumWordsFn sum_of = widest_sum_words();
    std::atomic<uint64_t> total{0};
    const int64_t start = now_ns();
    pool_->run([&](ThreadPool::Context& context) {
      uint64_t sum = 0;
      int64_t begin = 0, end = 0;
      while (context.next(n_words_, kChunkWords, &begin, &end)) sum += sum_of(words, begin, end);
      total.fetch_add(sum, std::memory_order_relaxed);
    });
    const double seconds = seconds_since(start);
    // The comparison is also what keeps the sums from being left out.
    const auto n = static_cast<uint64_t>(n_words_);
    const uint64_t expected = n % 2 == 0 ? n / 2 * (n - 1) : (n - 1) / 2 * n;
    return total.load() == expected ? seconds : 0.0;
  }

 private:
  // Every page is memory of its own then, and no shared page of zeros.
  void write() {
    auto* const words = buffer_.as<uint64_t>();
    pool_->run([&](ThreadPool::Context& context) {
      int64_t begin = 0, end = 0;
      while (context.next(n_words_, kChunkWords, &begin, &end)) {
        for (int64_t i = begin; i < end; ++i) words[i] = static_cast<uint64_t>(i);
      }
    });
    written_ = true;
  }

  int64_t n_words_;
  AlignedBuffer buffer_;
  std::optional<ThreadPool> pool_;
  bool written_ = false;
};

template <class T>
bool receive(int from, T* value) {
  return recv(from, value, sizeof(T), MSG_WAITALL) == sizeof(T);
}

template <class T>
bool tell(int to, const T& value) {
  return send(to, &value, sizeof(T), MSG_NOSIGNAL) == sizeof(T);
}

[[noreturn]] void serve(int socket, uint64_t bytes) {
  try {
    Reader reader(bytes);
    int n_threads = 0;
    while (receive(socket, &n_threads)) tell(socket, reader.seconds(n_threads));
  } catch (const std::exception&) {
    _exit(1);
  }
  _exit(0);
}

[[noreturn]] void cannot_measure(const char* what) {
  throw_error(ErrorKind::kIo, "cannot measure the read bandwidth: %s: %s (skip with --bandwidth 0)",
              what, std::strerror(errno));
}

// The first number of a one-line file, or of the line that starts with `key`; 0 where absent.
uint64_t read_number(const char* path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    if (key.empty()) return std::strtoull(word.c_str(), nullptr, 10);  // "max" is 0: no limit
    uint64_t value = 0;
    if (word == key && file >> value) return value;
  }
  return 0;
}

// What this process may still allocate; 0 where it cannot be told.
uint64_t available_bytes() {
  uint64_t available = read_number("/proc/meminfo", "MemAvailable:") * 1024;
  const struct {
    const char* limit;
    const char* used;
  } groups[] = {{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
                {"/sys/fs/cgroup/memory/memory.limit_in_bytes",
                 "/sys/fs/cgroup/memory/memory.usage_in_bytes"}};
  for (const auto& group : groups) {
    const uint64_t limit = read_number(group.limit, "");
    if (limit == 0) continue;
    const uint64_t used = read_number(group.used, "");
    const uint64_t left = limit > used ? limit - used : 1;
    available = available == 0 ? left : std::min(available, left);
  }
  return available;
}

}  // namespace

uint64_t bandwidth_bytes(uint64_t wanted) {
  constexpr uint64_t kUnit = uint64_t{1} << 20;
  const uint64_t available = available_bytes();
  const bool short_of_memory = available != 0 && available / 2 < wanted;
  return std::max((short_of_memory ? available / 2 : wanted) / kUnit, uint64_t{1}) * kUnit;
}

BandwidthMeter::BandwidthMeter(uint64_t bytes) : bytes_(bytes) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) cannot_measure("socketpair");
  child_ = fork();
  if (child_ == 0) {
    close(ends[0]);
    serve(ends[1], bytes);
  }
  close(ends[1]);
  socket_ = ends[0];
  if (child_ < 0) {
    close(socket_);
    cannot_measure("fork");
  }
}

BandwidthMeter::~BandwidthMeter() {
  close(socket_);  // the child ends
  waitpid(child_, nullptr, 0);
}

double BandwidthMeter::pass_seconds(int n_threads) {
  double seconds = 0.0;
  return tell(socket_, n_threads) && receive(socket_, &seconds) ? seconds : 0.0;
}

}  // namespace coreinfer::bench
