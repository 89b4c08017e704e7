// The plain row functions, kept for ever: what they compute is the definition that every
// instruction set is tested against. Threshold and quantisation have no faster version where the
// tables do not say otherwise.
#include <algorithm>
#include <bit>
#include <cmath>

#include "base/half.h"
#include "kernels/vector_tables.h"

namespace coreinfer::kernels {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  const float inverse = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * inverse * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* out) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float centred = x[i] - mean;
    squares += static_cast<double>(centred) * centred;
  }
  const float inverse = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) {
    const float normed = (x[i] - mean) * inverse * weight[i];
    out[i] = bias ? normed + bias[i] : normed;
  }
}

template <float (*kActivation)(float, float), bool kBoth = false>
void activate(const float* gate, const float* up, int64_t n, float threshold, float* h,
              float* act_gate) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = kActivation(gate[i], threshold);
    const float u = !up ? 1.0f : kBoth ? kActivation(up[i], threshold) : up[i];
    if (act_gate) act_gate[i] = a;
    h[i] = up ? a * u : a;
  }
}

// 1 / (1 + exp(-x)), without overflow on either side.
float sigmoid(float x) {
  const float e = std::exp(-std::fabs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

float silu(float x, float) { return x * sigmoid(x); }

float gelu_tanh(float x, float) {
  constexpr float kTwiceSqrt2OverPi = 1.5957691216057308f;
  const float u = kTwiceSqrt2OverPi * (x + 0.044715f * x * x * x);
  return x * sigmoid(u);  // (1 + tanh(u / 2)) / 2 = 1 / (1 + exp(-u))
}

float relu(float x, float threshold) { return x <= threshold ? 0.0f : x; }

void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += y[i];
}

void scale(float* x, float s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= s;
}

void blend(float* x, float a, const float* y, float b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * a + y[i] * b;
}

void rope_interleaved(float* x, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

void rope_halves(float* x, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i];
    const float b = x[i + pairs];
    x[i] = a * cos[i] - b * sin[i];
    x[i + pairs] = a * sin[i] + b * cos[i];
  }
}

// ---- attention

float as_float(float x) { return x; }
float as_float(uint16_t x) { return f16_to_f32(x); }

template <typename T>
void multiply(const float* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
              int64_t rows, int64_t depth, int64_t cols, bool accumulate, const T*) {
  for (int64_t i = 0; i < rows; ++i) {
    if (!accumulate) std::fill_n(c + i * ldc, cols, 0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      const float factor = a[i * lda + k];
      for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] += factor * as_float(b[k * ldb + j]);
    }
  }
}

float softmax(float* s, int64_t cols, int64_t begin, int64_t end, float softcap, float* max,
              float* sum) {
  if (softcap > 0) {
    for (int64_t j = begin; j < end; ++j) s[j] = softcap * std::tanh(s[j] / softcap);
  }
  const float before = *max;
  float now = before;
  for (int64_t j = begin; j < end; ++j) now = std::max(now, s[j]);
  float total = 0;
  for (int64_t j = 0; j < cols; ++j) {
    s[j] = j < begin || j >= end ? 0.0f : std::exp(s[j] - now);
    total += s[j];
  }
  const float correction = std::exp(before - now);
  *max = now;
  *sum = *sum * correction + total;
  return correction;
}

void widen(const uint16_t* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f16_to_f32(x[i]);
}

void narrow(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_to_f16(x[i]);
}

void quantize(const float* x, int64_t n, int8_t* codes, uint16_t* scales) {
  for (int64_t g = 0; g < n / kKvGroup; ++g) {
    const float* group = x + g * kKvGroup;
    float largest = 0;
    for (int64_t i = 0; i < kKvGroup; ++i) {
      // Written so that NaN is kept: it must show, not turn into a small number.
      if (!(std::fabs(group[i]) <= largest)) largest = std::fabs(group[i]);
    }
    scales[g] = f32_to_f16(largest / 127.0f);
    const float rounded_scale = f16_to_f32(scales[g]);
    const float inverse = rounded_scale > 0 ? 1.0f / rounded_scale : 0.0f;
    for (int64_t i = 0; i < kKvGroup; ++i) {
      const float code = std::nearbyint(group[i] * inverse);
      codes[g * kKvGroup + i] = static_cast<int8_t>(code > 127.0f     ? 127.0f
                                                    : code >= -127.0f ? code
                                                                      : -127.0f);
    }
  }
}

void unpack_row(const int8_t* codes, const uint16_t* scales, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = f16_to_f32(scales[i / kKvGroup]) * codes[i];
}

void unpack_block(const int8_t* codes, const uint16_t* scales, int64_t n, float* out) {
  for (int64_t g = 0; g < n / kKvGroup; ++g) {
    float scale_of[kKvBlock];
    widen(scales + g * kKvBlock, kKvBlock, scale_of);
    for (int64_t i = 0; i < kKvGroup * kKvBlock; ++i) {
      const int64_t at = g * kKvGroup * kKvBlock + i;
      out[at] = scale_of[i % kKvBlock] * codes[at];
    }
  }
}

// ---- neurons

constexpr int32_t kMagnitudeBits = 0x7fffffff;
constexpr int32_t kInfBits = 0x7f800000;

int32_t key_of(float h, bool magnitude) {
  const int32_t bits = std::bit_cast<int32_t>(h);
  return magnitude ? bits & kMagnitudeBits : bits;
}

int64_t positives(const float* h, int64_t n, bool magnitude, bool* finite) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (key_of(h[i], true) >= kInfBits) *finite = false;
    count += key_of(h[i], magnitude) > 0;
  }
  return count;
}

// The threshold once the k-th largest key is known: ties from the front, as many as are needed.
Threshold cut_ties(const float* h, int64_t n, bool magnitude, int32_t key, int64_t ties) {
  int64_t i = 0;
  for (; i < n && ties > 0; ++i) ties -= key_of(h[i], magnitude) == key;
  return {key, i};
}

Threshold threshold(const float* h, int64_t n, bool magnitude, int64_t k,
                    std::vector<int32_t>& scratch) {
  scratch.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) scratch[static_cast<size_t>(i)] = key_of(h[i], magnitude);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(),
                   std::greater<int32_t>());
  const int32_t key = scratch[static_cast<size_t>(k - 1)];
  const int64_t above = std::count_if(scratch.begin(), scratch.begin() + (k - 1),
                                      [key](int32_t other) { return other > key; });
  return cut_ties(h, n, magnitude, key, k - above);
}

void add_chosen(const float* h, int64_t begin, int64_t end, bool magnitude, Threshold chosen,
                float* scores) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t key = key_of(h[i], magnitude);
    if (key > chosen.key || (key == chosen.key && i < chosen.end)) scores[i] += 1.0f;
  }
}

double sum_squares(const float* h, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(h[i]) * h[i];
  return sum;
}

void add_squares(const float* h, int64_t begin, int64_t end, double factor, float* scores) {
  for (int64_t i = begin; i < end; ++i) {
    scores[i] += static_cast<float>(static_cast<double>(h[i]) * h[i] * factor);
  }
}

}  // namespace

void use_scalar(VectorTables& tables) {
  tables.vector = {.rms_norm = rms_norm,
                   .layer_norm = layer_norm,
                   .silu = activate<silu>,
                   .gelu_tanh = activate<gelu_tanh>,
                   .relu = activate<relu>,
                   .relu_both = activate<relu, true>,
                   .add = add,
                   .scale = scale,
                   .blend = blend,
                   .rope_interleaved = rope_interleaved,
                   .rope_halves = rope_halves};
  tables.attention = {.multiply_f32 = multiply<float>,
                      .multiply_f16 = multiply<uint16_t>,
                      .softmax = softmax,
                      .f16_to_f32 = widen,
                      .f32_to_f16 = narrow,
                      .quantize = quantize,
                      .unpack_row = unpack_row,
                      .unpack_block = unpack_block,
                      .tiles = nullptr};
  tables.count = {.positives = positives,
                  .threshold = threshold,
                  .add_chosen = add_chosen,
                  .sum_squares = sum_squares,
                  .add_squares = add_squares};
}

}  // namespace coreinfer::kernels
