// Compares the emulated AMX tiles (emulated_amx.h) with Intel's description of the instructions:
// element by element in plain C++, in cases whose result tells the order and the rounding, and in
// every use that faults. Exits with 1 and names what differs.
#include <sys/wait.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cfloat>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "base/half.h"
#include "emulated_amx.h"
#include "kernels/isa.h"

using namespace coreinfer;

namespace {

int failures = 0;

void check(bool good, const char* what) {
  if (good) return;
  ++failures;
  std::printf("%s differs\n", what);
}

struct alignas(64) Config {
  uint8_t bytes[64] = {1};

  Config& tile(int i, int rows, int row_bytes) {
    bytes[16 + 2 * i] = static_cast<uint8_t>(row_bytes);
    bytes[17 + 2 * i] = static_cast<uint8_t>(row_bytes >> 8);
    bytes[48 + i] = static_cast<uint8_t>(rows);
    return *this;
  }
};

float flushed(float v) { return std::fabs(v) < FLT_MIN ? std::copysign(0.0f, v) : v; }

// The manual's operation of TDPBF16PS: c (m, n), a (m, 2 k), b (k, 2 n).
void plain_dot(std::vector<float>& c, const std::vector<uint16_t>& a,
               const std::vector<uint16_t>& b, size_t rows, size_t depth, size_t cols) {
  const auto value = [](uint16_t bits) { return flushed(bf16_to_f32(bits)); };
  for (size_t m = 0; m < rows; ++m) {
    for (size_t n = 0; n < cols; ++n) {
      float sums[2] = {};
      for (size_t k = 0; k < depth; ++k) {
        for (size_t i = 0; i < 2; ++i) {
          sums[i] = flushed(std::fma(value(a[2 * (m * depth + k) + i]),
                                     value(b[2 * (k * cols + n) + i]), sums[i]));
        }
      }
      const float both = flushed(sums[0] + sums[1]);
      c[m * cols + n] = flushed(flushed(c[m * cols + n]) + both);
    }
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = std::isnan(a[i]) && std::isnan(b[i]);
    if (!both_nan && std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return false;
  }
  return a.size() == b.size();
}

// c += a b on tiles 0, 1 and 2, whose rows lie one after the other in memory.
void tile_dot(std::vector<float>& c, const std::vector<uint16_t>& a, const std::vector<uint16_t>& b,
              size_t rows, size_t depth, size_t cols) {
  const int m = static_cast<int>(rows), k = static_cast<int>(depth), n = static_cast<int>(cols);
  const Config config = Config().tile(0, m, 4 * n).tile(1, m, 4 * k).tile(2, k, 4 * n);
  _tile_loadconfig(&config);
  _tile_loadd(0, c.data(), 4 * n);
  _tile_loadd(1, a.data(), 4 * k);
  _tile_loadd(2, b.data(), 4 * n);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c.data(), 4 * n);
  _tile_release();
}

// Every shape, with values of all magnitudes: subnormal ones, and such that sums overflow.
void check_shapes() {
  std::mt19937 random_bits(1);
  for (const unsigned largest : {0x3f80u, 0x7f80u, 0xffffu}) {  // 1, infinity, every NaN
    for (size_t rows = 1; rows <= 16; ++rows) {
      const size_t depth = 1 + random_bits() % 16, cols = 1 + random_bits() % 16;
      std::vector<uint16_t> a(rows * depth * 2), b(depth * cols * 2);
      std::vector<float> c(rows * cols);
      const auto any = [&] { return static_cast<uint16_t>(random_bits() % largest); };
      for (uint16_t& v : a) v = any();
      for (uint16_t& v : b) v = any() ^ static_cast<uint16_t>(random_bits() % 2 << 15);
      for (float& v : c) v = bf16_to_f32(any());
      std::vector<float> expected = c;
      plain_dot(expected, a, b, rows, depth, cols);
      tile_dot(c, a, b, rows, depth, cols);
      check(same_bits(c, expected), "a product of random numbers");
    }
  }
}

// One row and one column: a's and b's elements along the depth.
float dot(float c, const std::vector<float>& a, const std::vector<float>& b) {
  std::vector<uint16_t> x, y;
  for (float v : a) x.push_back(f32_to_bf16(v));
  for (float v : b) y.push_back(f32_to_bf16(v));
  std::vector<float> sum = {c};
  tile_dot(sum, x, y, 1, a.size() / 2, 1);
  return sum[0];
}

void check_arithmetic() {
  const float big = 0x1p24f;  // an odd number more is a tie
  check(dot(0, {big, 1, 1, 1}, {1, 1, 1, 1}) == big + 2, "odd elements in a sum of their own");
  check(dot(big, {1, 1}, {1, 1}) == big + 2, "dst after the products");
  check(dot(0, {big, 0, 3, 0}, {1, 1, 1, 1}) == big + 4, "a tie that goes up to even");
  check(dot(0, {-0x1p127f, 0, 0x1p64f, 0}, {1, 0, 0x1p64f, 0}) == 0x1p127f, "a fused product");
  check(dot(0, {0x1p-120f, 0, 0x1p-65f, 0}, {1, 0, 0x1p-65f, 0}) == 0x1p-120f + 0x1p-130f,
        "a product below the normal numbers, added");
  check(dot(0, {0x1p-65f, 0}, {0x1p-65f, 0}) == 0, "a subnormal sum");
  check(dot(0, {0x1p-130f, 0}, {0x1p100f, 0}) == 0, "a subnormal element");
  check(dot(0x1p-130f, {0, 0}, {0, 0}) == 0, "a subnormal dst");
  check(dot(0x1.8p-126f, {-0x1p-126f, 0}, {1, 0}) == 0, "a subnormal result");
}

void check_mxcsr() {
  const unsigned before = _mm_getcsr();
  const unsigned toward_zero = 0x7f80;
  _mm_setcsr(toward_zero);
  const float sum = dot(0, {0x1p24f, 0, 3, 0}, {1, 1, 1, 1});
  dot(0, {0x1p127f, 0}, {0x1p127f, 0});  // overflows
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  check(sum == 0x1p24f + 4, "a tie under the caller's own rounding");
  check(after == toward_zero, "MXCSR after a product");
}

void check_loads() {
  std::vector<uint8_t> from(16 * 80), to(16 * 80, 0xaa), expected = to;
  std::mt19937 random_bits(2);
  for (uint8_t& v : from) v = static_cast<uint8_t>(random_bits());
  const Config config = Config().tile(3, 5, 12).tile(7, 16, 64);
  _tile_loadconfig(&config);
  _tile_loadd(3, from.data() + 1, 80);
  _tile_stored(3, to.data() + 3, 70);
  for (size_t r = 0; r < 5; ++r) std::memcpy(&expected[3 + 70 * r], &from[1 + 80 * r], 12);
  check(to == expected, "a tile's way through memory");
  _tile_zero(3);
  _tile_stored(3, to.data() + 3, 70);
  for (size_t r = 0; r < 5; ++r) std::memset(&expected[3 + 70 * r], 0, 12);
  check(to == expected, "a zeroed tile");
  _tile_loadd(7, from.data(), 64);
  _tile_loadconfig(&config);
  _tile_stored(7, to.data(), 64);
  expected.assign(16 * 64, 0);
  expected.resize(to.size());
  check(std::memcmp(to.data(), expected.data(), 16 * 64) == 0, "a tile after its configuration");
  _tile_release();
}

// What the process says on stderr when it aborts in `use`; empty where it does not.
std::string last_words(const std::function<void()>& use) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    use();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char part[256];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) {
    said.append(part, static_cast<size_t>(n));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? said : "";
}

void check_fault(std::string_view expected, const std::function<void()>& use) {
  const std::string said = last_words(use);
  if (said.find(expected) != std::string::npos) return;
  ++failures;
  std::printf("expected a fault with '%.*s', found '%s'\n", static_cast<int>(expected.size()),
              expected.data(), said.c_str());
}

void check_faults() {
  alignas(64) static uint8_t memory[1024];
  const auto configured = [](const Config& config, const std::function<void()>& use) {
    return [=] {
      _tile_loadconfig(&config);
      use();
    };
  };
  const auto with_byte = [&](int i, uint8_t value) {
    Config config;
    config.bytes[i] = value;
    return configured(config, [] {});
  };
  const Config fitting = Config().tile(0, 4, 32).tile(1, 4, 12).tile(2, 3, 32);
  const auto multiply = [] { _tile_dpbf16ps(0, 1, 2); };

  const char* const early = "before tiles were configured";
  check_fault(early, [] { _tile_zero(0); });
  check_fault(early, [] { _tile_loadd(0, memory, 64); });
  check_fault(early, [] { _tile_stored(0, memory, 64); });
  check_fault(early, multiply);
  check_fault(early, configured(fitting, [] {
                _tile_release();
                _tile_zero(0);
              }));
  check_fault("tile 3, which the configuration leaves out",
              configured(fitting, [] { _tile_zero(3); }));
  check_fault("tile 8, expected 0 to 7", configured(fitting, [] { _tile_zero(8); }));

  check_fault("palette 2", with_byte(0, 2));
  check_fault("start row 1", with_byte(1, 1));
  for (int i : {2, 15, 32, 47, 56, 63}) check_fault("reserved byte", with_byte(i, 1));
  check_fault("17 rows of 64 bytes", configured(Config().tile(0, 17, 64), [] {}));
  check_fault("16 rows of 65 bytes", configured(Config().tile(5, 16, 65), [] {}));
  check_fault("16 rows of 0 bytes", configured(Config().tile(7, 16, 0), [] {}));
  check_fault("0 rows of 64 bytes", configured(Config().tile(0, 0, 64), [] {}));

  check(last_words(configured(fitting, multiply)).empty(), "a product of tiles that fit");
  check_fault("expected three", configured(fitting, [] { _tile_dpbf16ps(0, 1, 1); }));
  check_fault("do not fit", configured(Config(fitting).tile(0, 5, 32), multiply));
  check_fault("do not fit", configured(Config(fitting).tile(0, 4, 28), multiply));
  check_fault("do not fit", configured(Config(fitting).tile(2, 4, 32), multiply));
  check_fault("do not fit", configured(Config(fitting).tile(1, 4, 14), multiply));
}

}  // namespace

int main() {
  if (available_isas().back() != Isa::kAmx) {
    std::printf("this CPU has no AVX-512 BF16: the emulated tiles were not checked\n");
    return EXIT_SUCCESS;
  }
  check_shapes();
  check_arithmetic();
  check_mxcsr();
  check_loads();
  check_faults();
  std::printf("checked emulated AMX tiles\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
