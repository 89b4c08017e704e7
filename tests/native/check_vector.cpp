// Compares the row functions of every instruction set that can run here with the plain ones, at
// every short length and at odd addresses. For machines without Python, such as an emulated
// AArch64; the comparison with NumPy is in tests/test_vector.py. Exits with 1 and names what
// differs.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention_block.h"
#include "kernels/count_row.h"
#include "kernels/isa.h"
#include "kernels/vector.h"

using namespace coreinfer;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

void check(bool good, Isa isa, const char* what, int64_t n) {
  if (good) return;
  ++failures;
  std::printf("%s differs from scalar on %s at length %lld\n", what,
              std::string(isa_name(isa)).c_str(), static_cast<long long>(n));
}

// Values of a row that starts one element behind an aligned address.
std::vector<float> values(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n) + 1);
  for (float& v : x) v = scale * normal(random_bits);
  return x;
}

// Equal to a few units in the last place of the larger, or of `size` where terms cancel.
bool close(const std::vector<float>& a, const std::vector<float>& b, float size = 0.0f) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return false;
    const float largest = std::fmax(std::fmax(std::fabs(a[i]), std::fabs(b[i])), size);
    if (std::fabs(a[i] - b[i]) > 1e-5f * largest + 1e-37f) return false;
  }
  return true;
}

void check_vector(Isa isa, int64_t n) {
  const VectorKernels& plain = vector_kernels(Isa::kScalar);
  const VectorKernels& fast = vector_kernels(isa);
  const std::vector<float> x = values(n, 3.0f), y = values(n), w = values(n);
  const auto compare = [&](const char* what, auto&& run) {
    std::vector<float> a = x, b = x;
    run(plain, a.data() + 1);
    run(fast, b.data() + 1);
    check(close(a, b, 1.0f), isa, what, n);
  };
  compare("add", [&](const VectorKernels& k, float* p) { k.add(p, y.data() + 1, n); });
  compare("scale", [&](const VectorKernels& k, float* p) { k.scale(p, 0.7f, n); });
  compare("blend", [&](const VectorKernels& k, float* p) { k.blend(p, .7f, y.data() + 1, 3, n); });
  compare("silu",
          [&](const VectorKernels& k, float* p) { k.silu(p, w.data() + 1, n, 0.0f, p, nullptr); });
  compare("gelu_tanh",
          [&](const VectorKernels& k, float* p) { k.gelu_tanh(p, nullptr, n, 0.0f, p, nullptr); });
  compare("relu",
          [&](const VectorKernels& k, float* p) { k.relu(p, w.data() + 1, n, 0.25f, p, nullptr); });
  compare("relu_both",
          [&](const VectorKernels& k, float* p) { k.relu_both(p, p, n, 0.25f, p, nullptr); });
  if (n > 0) {
    compare("rms_norm",
            [&](const VectorKernels& k, float* p) { k.rms_norm(p, w.data() + 1, 1e-5f, n, p); });
    compare("layer_norm", [&](const VectorKernels& k, float* p) {
      k.layer_norm(p, w.data() + 1, y.data() + 1, 1e-5f, n, p);
    });
  }
  compare("rope_halves", [&](const VectorKernels& k, float* p) {
    k.rope_halves(p, y.data() + 1, w.data() + 1, n / 2);
  });
  compare("rope_interleaved", [&](const VectorKernels& k, float* p) {
    k.rope_interleaved(p, y.data() + 1, w.data() + 1, n / 2);
  });
}

void check_attention(Isa isa, int64_t n) {
  const AttentionKernels& plain = attention_kernels(Isa::kScalar);
  const AttentionKernels& fast = attention_kernels(isa);
  const auto size = static_cast<size_t>(n);
  const std::vector<float> x = values(n, 2.0f);
  std::vector<uint16_t> half_a(size + 1), half_b(size + 1);
  plain.f32_to_f16(x.data() + 1, n, half_a.data() + 1);
  fast.f32_to_f16(x.data() + 1, n, half_b.data() + 1);
  check(half_a == half_b, isa, "f32_to_f16", n);
  std::vector<float> wide_a(size + 1), wide_b(size + 1);
  plain.f16_to_f32(half_a.data() + 1, n, wide_a.data() + 1);
  fast.f16_to_f32(half_a.data() + 1, n, wide_b.data() + 1);
  check(wide_a == wide_b, isa, "f16_to_f32", n);

  constexpr int64_t kDepth = 33;
  const std::vector<float> a = values(9 * kDepth), b = values(kDepth * n);
  std::vector<uint16_t> half(b.size());
  plain.f32_to_f16(b.data(), static_cast<int64_t>(b.size()), half.data());
  const float* const left = a.data() + 1;
  const float* const right = b.data() + 1;
  const uint16_t* const right16 = half.data() + 1;
  for (int64_t rows = 1; rows <= 9; ++rows) {
    for (const bool accumulate : {false, true}) {
      std::vector<float> c = values(rows * n), d = c, e = c, f = c;
      plain.multiply_f32(left, kDepth, right, n, c.data() + 1, n, rows, kDepth, n, accumulate,
                         nullptr);
      fast.multiply_f32(left, kDepth, right, n, d.data() + 1, n, rows, kDepth, n, accumulate,
                        nullptr);
      check(close(c, d, 30.0f), isa, "multiply_f32", n);
      plain.multiply_f16(left, kDepth, right16, n, e.data() + 1, n, rows, kDepth, n, accumulate,
                         right16);
      fast.multiply_f16(left, kDepth, right16, n, f.data() + 1, n, rows, kDepth, n, accumulate,
                        right16);
      check(close(e, f, 30.0f), isa, "multiply_f16", n);
    }
  }
  if (n >= 1 && n <= kKvBlock) {
    for (const float softcap : {0.0f, 5.0f}) {
      std::vector<float> s = values(n, 4.0f), t = s;
      float max[2] = {-1.0f, -1.0f}, sum[2] = {2.0f, 2.0f};
      const int64_t begin = n / 3, end = n - n / 4;
      const float p = plain.softmax(s.data() + 1, n, begin, end, softcap, &max[0], &sum[0]);
      const float q = fast.softmax(t.data() + 1, n, begin, end, softcap, &max[1], &sum[1]);
      check(close(s, t) && close({p, max[0], sum[0]}, {q, max[1], sum[1]}), isa, "softmax", n);
    }
  }
  if (n % kKvGroup == 0) {
    const auto groups = static_cast<size_t>(n / kKvGroup);
    std::vector<int8_t> codes_a(size), codes_b(size);
    std::vector<uint16_t> scales_a(groups), scales_b(groups);
    plain.quantize(x.data() + 1, n, codes_a.data(), scales_a.data());
    fast.quantize(x.data() + 1, n, codes_b.data(), scales_b.data());
    check(codes_a == codes_b && scales_a == scales_b, isa, "quantize", n);
    std::vector<float> row_a(size), row_b(size);
    plain.unpack_row(codes_a.data(), scales_a.data(), n, row_a.data());
    fast.unpack_row(codes_a.data(), scales_a.data(), n, row_b.data());
    check(row_a == row_b, isa, "unpack_row", n);
    std::vector<int8_t> block(size * kKvBlock, 3);
    for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<int8_t>(i * 7 % 255 - 127);
    const std::vector<uint16_t> scales(groups * kKvBlock, 0x3555);
    std::vector<float> out_a(block.size()), out_b(block.size());
    plain.unpack_block(block.data(), scales.data(), n, out_a.data());
    fast.unpack_block(block.data(), scales.data(), n, out_b.data());
    check(out_a == out_b, isa, "unpack_block", n);
  }
}

void check_count(Isa isa, int64_t n, bool tied) {
  const CountKernels& plain = count_kernels(Isa::kScalar);
  const CountKernels& fast = count_kernels(isa);
  std::vector<float> row = values(n);
  if (tied) {
    for (float& v : row) v = std::round(v);
  }
  float* const h = row.data() + 1;
  std::vector<int32_t> scratch;
  for (const bool magnitude : {false, true}) {
    bool finite = true, still_finite = true;
    const int64_t count = plain.positives(h, n, magnitude, &finite);
    check(count == fast.positives(h, n, magnitude, &still_finite) && still_finite, isa, "positives",
          n);
    for (int64_t k = 1; k <= count; k += 1 + count / 7) {
      const Threshold a = plain.threshold(h, n, magnitude, k, scratch);
      const Threshold b = fast.threshold(h, n, magnitude, k, scratch);
      std::vector<float> s(row.size()), t(row.size());
      plain.add_chosen(h, 0, n, magnitude, a, s.data() + 1);
      fast.add_chosen(h, n / 3, n, magnitude, b, t.data() + 1);
      fast.add_chosen(h, 0, n / 3, magnitude, b, t.data() + 1);
      check(s == t, isa, "threshold", n);
    }
  }
  const double squares = plain.sum_squares(h, n);
  check(std::fabs(squares - fast.sum_squares(h, n)) <= 1e-12 * squares, isa, "sum_squares", n);
  std::vector<float> s(row.size(), 1.0f), t = s;
  plain.add_squares(h, n / 3, n, 0.37, s.data() + 1);
  fast.add_squares(h, n / 3, n, 0.37, t.data() + 1);
  check(s == t, isa, "add_squares", n);
  h[n / 2] = std::numeric_limits<float>::infinity();
  bool finite = true;
  fast.positives(h, n, false, &finite);
  check(!finite, isa, "finding Inf", n);
}

}  // namespace

int main() {
  for (const Isa isa : available_isas()) {
    if (isa == Isa::kScalar) continue;
    for (int64_t n = 0; n <= 140; ++n) {
      check_vector(isa, n);
      check_attention(isa, n);
      for (const bool tied : {false, true}) {
        if (n > 0) check_count(isa, n, tied);
        if (n > 0) check_count(isa, 17 * n, tied);
      }
    }
    std::printf("%s: checked\n", std::string(isa_name(isa)).c_str());
  }
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
