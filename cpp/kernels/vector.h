// Row functions between the matrix products: norms, activations, rope, sums. One table an
// instruction set; each works on one row of float32, by one thread, with the same bits every time.
// Lengths are arbitrary, pointers need no alignment. Attention and neuron counting have tables of
// their own (attention_block.h, count_row.h).
#pragma once

#include <cstdint>

#include "kernels/isa.h"

namespace coreinfer {

// h = act(gate) * up, or act(gate) where up is null; act_gate (may be null) receives act(gate).
// h may be gate or up. Only relu and relu_both look at the threshold.
using ActivateFn = void (*)(const float* gate, const float* up, int64_t n, float threshold,
                            float* h, float* act_gate);

struct VectorKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  // out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; bias may be null, out may be x.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                     float* out);
  ActivateFn silu;       // x / (1 + exp(-x))
  ActivateFn gelu_tanh;  // x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
  ActivateFn relu;       // x where above the threshold, else 0; NaN stays NaN
  ActivateFn relu_both;  // relu(gate) * relu(up)
  // x += y
  void (*add)(float* x, const float* y, int64_t n);
  // x *= s
  void (*scale)(float* x, float s, int64_t n);
  // x = x * a + y * b
  void (*blend)(float* x, float a, const float* y, float b, int64_t n);
  // Turns pair i by the angle of (cos[i], sin[i]). Pairs are (x[2i], x[2i+1]) when interleaved and
  // (x[i], x[i + pairs]) in halves.
  void (*rope_interleaved)(float* x, const float* cos, const float* sin, int64_t pairs);
  void (*rope_halves)(float* x, const float* cos, const float* sin, int64_t pairs);
};

// The table of one of available_isas(); what an instruction set does not have comes from a plainer
// one.
const VectorKernels& vector_kernels(Isa isa);

}  // namespace coreinfer
