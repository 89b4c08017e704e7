// The kernels of matvec.h, instantiated by matvec_*.cu, a file a part to share compile time.
// Sums are written with fmaf and compiled without contraction, so that every instantiation rounds
// alike.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "matvec.h"

namespace coreinfer::cuda {

inline constexpr int kMatvecWarps = 4;  // outputs of a block
// Rows that share one pass over the weights when there is more than one.
inline constexpr int kRowTile = 4;

__device__ __forceinline__ float activated(Epilogue activation, float x) {
  if (activation == Epilogue::kRelu) return x <= 0.0f ? 0.0f : x;
  float u = x;
  if (activation == Epilogue::kGeluTanh) {
    u = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi)
  }
  const float e = expf(-fabsf(u));
  return x * ((u < 0.0f ? e : 1.0f) / (1.0f + e));
}

// 16-byte loads of float weights that are under way together.
inline constexpr int kFloatLoads = 4;

template <Codes kCodes>
__device__ __forceinline__ void float_weights(uint4 raw, float (&w)[float_step(kCodes)]) {
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kCodes == Codes::kF32) {
      w[i] = __uint_as_float(words[i]);
    } else if constexpr (kCodes == Codes::kF16) {
      w[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
      w[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
    } else {
      w[2 * i] = brain_to_float(words[i] & 0xffffu);
      w[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

// sum[r] += this lane's part of row r of x times row `row` of w.
template <Codes kCodes, int kRows>
__device__ __forceinline__ void dot_floats(const WeightView& w, int64_t row, const PreparedRows& x,
                                           int first, int n, float (&sum)[kRows]) {
  constexpr int kElements = float_step(kCodes);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const auto* weights = reinterpret_cast<const uint4*>(w.lo + row * w.lo_stride);
  for (int at = lane; at < w.n_chunks; at += kWarp * kFloatLoads) {
    uint4 raw[kFloatLoads];
#pragma unroll
    for (int u = 0; u < kFloatLoads; ++u) {
      const int load = at + u * kWarp;
      if (load < w.n_chunks) raw[u] = weights[load];
    }
#pragma unroll
    for (int u = 0; u < kFloatLoads; ++u) {
      const int load = at + u * kWarp;
      if (load >= w.n_chunks) break;
      float values[kElements];
      float_weights<kCodes>(raw[u], values);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= n) break;
        const auto* in = reinterpret_cast<const float4*>(x.values + (first + r) * x.values_stride +
                                                         static_cast<int64_t>(load) * kElements);
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i) {
          const float4 v = in[i];
          sum[r] = fmaf(values[4 * i], v.x, sum[r]);
          sum[r] = fmaf(values[4 * i + 1], v.y, sum[r]);
          sum[r] = fmaf(values[4 * i + 2], v.z, sum[r]);
          sum[r] = fmaf(values[4 * i + 3], v.w, sum[r]);
        }
      }
    }
  }
}

// The scale of step i of a stored chunk: that of its half chunk in the source.
struct StepScale {
  float s, m;
};
__device__ __forceinline__ StepScale step_scale(const WeightView& w, int64_t row, int chunk,
                                                int i) {
  const int half = w.steps[chunk * kStepsPerChunk + i];
  const ChunkScales scales = decode_scales(w.scales, load_scales(w, row, half / 2));
  return half % 2 == 0 ? StepScale{scales.s[0], scales.m[0]} : StepScale{scales.s[1], scales.m[1]};
}

// Chunks of quantised weights that are under way together.
inline constexpr int kChunkLoads = 2;

// The same for quantised weights times 8-bit codes: exact integer sums of what shares a scale.
template <Codes kCodes, int kRows, bool kPicked>
__device__ __forceinline__ void dot_codes(const WeightView& w, int64_t row, const PreparedRows& x,
                                          int first, int n, float (&sum)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int at = lane; at < w.n_chunks; at += kWarp * kChunkLoads) {
    RawCodes raw[kChunkLoads];
    RawScales raw_scales[kChunkLoads];
#pragma unroll
    for (int u = 0; u < kChunkLoads; ++u) {
      const int chunk = at + u * kWarp;
      if (chunk >= w.n_chunks) break;
      load_codes<kCodes>(w, row, chunk, &raw[u]);
      if (!kPicked) raw_scales[u] = load_scales(w, row, chunk);
    }
#pragma unroll
    for (int u = 0; u < kChunkLoads; ++u) {
      const int chunk = at + u * kWarp;
      if (chunk >= w.n_chunks) break;
      unsigned q[8];
      unpack_codes<kCodes>(raw[u], q);
      ChunkScales scales{};
      if (!kPicked) scales = decode_scales(w.scales, raw_scales[u]);
      float step_s[8], step_m[8];
      if (kPicked) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const StepScale s = step_scale(w, row, chunk, i);
          step_s[i] = s.s;
          step_m[i] = s.m;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= n) break;
        const auto* codes = reinterpret_cast<const uint4*>(x.codes + (first + r) * x.codes_stride) +
                            static_cast<int64_t>(chunk) * 2;
        const uint4 a = codes[0], b = codes[1];
        const unsigned in[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        const ChunkInput input = x.chunks[(first + r) * x.chunks_stride + chunk];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float total = 0.0f;
          if (kPicked) {
#pragma unroll
            for (int i = 4 * half; i < 4 * half + 4; ++i) {
              const int codes_sum = __dp4a(0x01010101, static_cast<int>(in[i]), 0);
              const int dot = __dp4a(static_cast<int>(q[i]), static_cast<int>(in[i]), 0);
              total = fmaf(step_s[i], static_cast<float>(dot - w.offset * codes_sum), total);
              total = fmaf(step_m[i], static_cast<float>(codes_sum), total);
            }
          } else {
            int dot = 0;
#pragma unroll
            for (int i = 4 * half; i < 4 * half + 4; ++i) {
              dot = __dp4a(static_cast<int>(q[i]), static_cast<int>(in[i]), dot);
            }
            const int codes_sum = static_cast<int16_t>(input.sums >> (16 * half));
            total = scales.s[half] * static_cast<float>(dot - w.offset * codes_sum);
            total = fmaf(scales.m[half], static_cast<float>(codes_sum), total);
          }
          sum[r] = fmaf(input.scale[half], total, sum[r]);
        }
      }
    }
  }
}

// The same for quantised weights times float32.
template <Codes kCodes, int kRows, bool kPicked>
__device__ __forceinline__ void dot_values(const WeightView& w, int64_t row, const PreparedRows& x,
                                           int first, int n, float (&sum)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int chunk = lane; chunk < w.n_chunks; chunk += kWarp) {
    RawCodes raw;
    load_codes<kCodes>(w, row, chunk, &raw);
    unsigned q[8];
    unpack_codes<kCodes>(raw, q);
    ChunkScales scales{};
    if (!kPicked) scales = decode_scales(w.scales, load_scales(w, row, chunk));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      StepScale s{scales.s[i / 4], scales.m[i / 4]};
      if (kPicked) s = step_scale(w, row, chunk, i);
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[j] = s.s * static_cast<float>(code_of(q[i], j) - w.offset) + s.m;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= n) break;
        const float4 v =
            *reinterpret_cast<const float4*>(x.values + (first + r) * x.values_stride +
                                             static_cast<int64_t>(chunk) * kChunk + 4 * i);
        sum[r] = fmaf(values[0], v.x, sum[r]);
        sum[r] = fmaf(values[1], v.y, sum[r]);
        sum[r] = fmaf(values[2], v.z, sum[r]);
        sum[r] = fmaf(values[3], v.w, sum[r]);
      }
    }
  }
}

template <Codes kCodes, int kRows, bool kFloats, bool kPicked>
__global__ void __launch_bounds__(kMatvecWarps* kWarp)
    matvec_kernel(COREINFER_PARAMETER MatvecArgs a) {
  begin_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t output =
      static_cast<int64_t>(blockIdx.x) * kMatvecWarps + static_cast<int>(threadIdx.x) / kWarp;
  if (output >= a.n_outputs) return;
  const bool hidden = a.epilogue != Epilogue::kStore;
  int number = 0;
  if (!hidden) {
    while (number + 1 < a.n_jobs && output >= a.jobs[number + 1].first) ++number;
  }
  const int last = hidden ? a.n_jobs - 1 : number;
  const int64_t row = output - (hidden ? 0 : a.jobs[number].first);
  for (int first = 0; first < a.n_rows; first += kRows) {
    const int n = a.n_rows - first < kRows ? a.n_rows - first : kRows;
    float up[kRows] = {}, sum[kRows] = {};
    // One matrix, or up and then the gate.
    for (int j = number; j <= last; ++j) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        up[r] = sum[r];
        sum[r] = 0.0f;
      }
      const WeightView& w = a.jobs[j].w;
      if constexpr (kCodes == Codes::kF32 || kCodes == Codes::kF16 || kCodes == Codes::kBF16) {
        dot_floats<kCodes>(w, row, a.x, first, n, sum);
      } else if constexpr (kFloats) {
        dot_values<kCodes, kRows, kPicked>(w, row, a.x, first, n, sum);
      } else {
        dot_codes<kCodes, kRows, kPicked>(w, row, a.x, first, n, sum);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = warp_sum(sum[r]);
    }
    // Lane r finishes row r.
    float y = sum[0], u = up[0];
#pragma unroll
    for (int r = 1; r < kRows; ++r) {
      if (lane == r) {
        y = sum[r];
        u = up[r];
      }
    }
    if (lane >= n) continue;
    const MatvecJob& job = a.jobs[number];
    const float bias = job.bias != nullptr ? job.bias[row] : 0.0f;
    float* out = job.out + (first + lane) * job.out_stride + row;
    if (!hidden) {
      y += bias;
      *out = job.accumulate != 0 ? *out + y : y;
      continue;
    }
    const bool gated = a.n_jobs == 2;
    const float act = activated(a.epilogue, gated ? y : y + bias);
    if (a.act_gate != nullptr) a.act_gate[(first + lane) * a.act_gate_stride + row] = act;
    *out = gated ? act * (u + bias) : act;
  }
}

template <Codes kCodes, bool kFloats, bool kPicked>
void launch_matvec(Context& context, const MatvecArgs& a) {
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(a.n_outputs, kMatvecWarps)));
  const dim3 block(kMatvecWarps * kWarp);
  if constexpr (!kFloats || !(kCodes >= Codes::k8)) {
    if (a.n_rows == 1) {
      context.launch(matvec_kernel<kCodes, 1, kFloats, kPicked>, grid, block, 0, a);
      return;
    }
  }
  context.launch(matvec_kernel<kCodes, kRowTile, kFloats, kPicked>, grid, block, 0, a);
}

// Each in a file of its own; false where another file has the codes.
bool matvec_floats(Context& context, const MatvecArgs& args);
bool matvec_4bit(Context& context, const MatvecArgs& args, bool floats);
bool matvec_other(Context& context, const MatvecArgs& args, bool floats);

template <Codes kCodes>
void launch_quantised(Context& context, const MatvecArgs& a, bool floats) {
  const bool picked = a.jobs[0].w.steps != nullptr;
  if (floats && picked) return launch_matvec<kCodes, true, true>(context, a);
  if (floats) return launch_matvec<kCodes, true, false>(context, a);
  if (picked) return launch_matvec<kCodes, false, true>(context, a);
  launch_matvec<kCodes, false, false>(context, a);
}

}  // namespace coreinfer::cuda
