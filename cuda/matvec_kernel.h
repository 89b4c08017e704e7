// The kernels of matvec.h, instantiated by matvec_*.cu, a file a part to share compile time.
// Sums are written with fmaf and compiled without contraction, so that every instantiation rounds
// alike.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "matvec.h"

namespace coreinfer::cuda {

inline constexpr int kMatvecWarps = 4;  // of a block
// Rows of weights that a warp works on side by side: two neighbours, or one of up and one of gate.
inline constexpr int kPair = 2;
// Rows of the input that share one pass over the weights when there is more than one.
inline constexpr int kRowTile = 4;

__host__ __device__ constexpr bool is_float(Codes c) {
  return c == Codes::kF32 || c == Codes::kF16 || c == Codes::kBF16;
}

__device__ __forceinline__ float activated(Epilogue activation, float threshold, float x) {
  if (activation == Epilogue::kRelu || activation == Epilogue::kReluBoth) {
    return x <= threshold ? 0.0f : x;
  }
  float u = x;
  if (activation == Epilogue::kGeluTanh) {
    u = 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi)
  }
  const float e = expf(-fabsf(u));
  return x * ((u < 0.0f ? e : 1.0f) / (1.0f + e));
}

// What multiplies the activated gate.
__device__ __forceinline__ float activated_up(Epilogue activation, float threshold, float up) {
  return activation == Epilogue::kReluBoth && up <= threshold ? 0.0f : up;
}

// ---- What is under way

// A warp's chunks from `begin` on are one a lane. A lane past the end takes the last one again: it
// is not `here`, and what it makes of that is not taken.
struct LaneChunk {
  int chunk;
  bool here;
};
__device__ __forceinline__ LaneChunk chunk_of_lane(int begin, int n_chunks) {
  const int chunk = begin + static_cast<int>(threadIdx.x) % kWarp;
  const bool here = chunk < n_chunks;
  return {here ? chunk : n_chunks - 1, here};
}

// Chunks of a row (of float types: 16 bytes) that a lane loads before it uses the first.
__host__ __device__ constexpr int loads_ahead(Codes c, int rows) {
  return c == Codes::k8 || c == Codes::k6 || (rows > 1 && !is_float(c)) ? 2 : 4;
}

template <Format kFormat, bool kPicked, int kLoads>
struct Ahead {
  RawCodes codes[kLoads][kPair];
  RawScales scales[kLoads][kPair];

  // A warp's chunks from `at` on. Picked columns: scales come by the step.
  __device__ __forceinline__ void load(const WeightRow (&w)[kPair], int n_chunks, int at) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int begin = at + u * kWarp;
      if (begin >= n_chunks) break;
      const int chunk = chunk_of_lane(begin, n_chunks).chunk;
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
        load_codes<kFormat.codes>(w[k], chunk, &codes[u][k]);
        if constexpr (!is_float(kFormat.codes) && !kPicked) {
          scales[u][k] = load_scales(kFormat.scales, w[k], chunk);
        }
      }
    }
  }
};

// ---- Float weights

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

// sum[k][r] += this lane's part of row r of x times row k of w. again: nothing is loaded ahead.
template <Format kFormat, int kRows, int kLoads>
__device__ __forceinline__ void dot_floats(const WeightRow (&w)[kPair], int n_chunks,
                                           Ahead<kFormat, false, kLoads>& ahead,
                                           const PreparedRows& x, int n, bool again,
                                           float (&sum)[kPair][kRows]) {
  constexpr int kElements = float_step(kFormat.codes);
  for (int at = 0; at < n_chunks; at += kWarp * kLoads) {
    if (at > 0 || again) ahead.load(w, n_chunks, at);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int begin = at + u * kWarp;
      if (begin >= n_chunks) break;
      const auto [chunk, here] = chunk_of_lane(begin, n_chunks);
      float values[kPair][kElements];
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
        float_weights<kFormat.codes>(ahead.codes[u][k].lo[0], values[k]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kRows > 1 && r >= n) break;
        const auto* in = reinterpret_cast<const float4*>(x.values + r * x.values_stride +
                                                         static_cast<int64_t>(chunk) * kElements);
#pragma unroll
        for (int i = 0; i < kElements / 4; ++i) {
          const float4 v = in[i];
#pragma unroll
          for (int k = 0; k < kPair; ++k) {
            float s = fmaf(values[k][4 * i], v.x, sum[k][r]);
            s = fmaf(values[k][4 * i + 1], v.y, s);
            s = fmaf(values[k][4 * i + 2], v.z, s);
            s = fmaf(values[k][4 * i + 3], v.w, s);
            sum[k][r] = here ? s : sum[k][r];
          }
        }
      }
    }
  }
}

// ---- Quantised weights

struct StepScale {
  float s, m;
};
// The scale of a half chunk of the source.
template <Format kFormat>
__device__ __forceinline__ StepScale half_scale(const WeightRow& w, int half) {
  const ChunkScales scales =
      decode_scales(kFormat.scales, load_scales(kFormat.scales, w, half / 2));
  return half % 2 == 0 ? StepScale{scales.s[0], scales.m[0]} : StepScale{scales.s[1], scales.m[1]};
}

// Rows of the input from `first` on.
__device__ __forceinline__ PreparedRows rows_from(PreparedRows x, int first) {
  x.values += first * x.values_stride;
  x.codes += first * x.codes_stride;
  x.chunks += first * x.chunks_stride;
  return x;
}

// The input of a chunk.
struct ChunkCodes {
  unsigned codes[8];
  ChunkInput of;
};
__device__ __forceinline__ ChunkCodes load_input(const PreparedRows& x, int row, int chunk) {
  const int8_t* codes = x.codes + row * x.codes_stride;
  const uint4 a = reinterpret_cast<const uint4*>(codes)[chunk];
  const uint4 b = reinterpret_cast<const uint4*>(codes + x.codes_stride / 2)[chunk];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, x.chunks[row * x.chunks_stride + chunk]};
}
__device__ __forceinline__ int sum_of_half(const ChunkInput& input, int half) {
  return static_cast<int16_t>(input.sums >> (16 * half));
}

// What a chunk adds to the sum: exact integer sums of what shares a scale.
template <Format kFormat>
__device__ __forceinline__ float add_chunk(float sum, const unsigned (&q)[8],
                                           const ChunkScales& scales, const ChunkCodes& in) {
  constexpr bool kByHalves =
      kFormat.scales == Scales::kSigned || kFormat.scales == Scales::kNibbles;
  float dots[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int dot = -kFormat.offset * sum_of_half(in.of, half);
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      dot = __dp4a(static_cast<int>(q[i]), static_cast<int>(in.codes[i]), dot);
    }
    dots[half] = in.of.scale[half] * static_cast<float>(dot);
  }
  if constexpr (kByHalves) {
    sum = fmaf(scales.s[0], dots[0], sum);
    sum = fmaf(scales.s[1], dots[1], sum);
  } else {
    sum = fmaf(scales.s[0], dots[0] + dots[1], sum);
  }
  if constexpr (kFormat.scales == Scales::kNibbles) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weighted = in.of.scale[half] * static_cast<float>(sum_of_half(in.of, half));
      sum = fmaf(scales.m[half], weighted, sum);
    }
  } else if constexpr (kFormat.scales == Scales::kHalfPair || kFormat.scales == Scales::kPair) {
    sum = fmaf(scales.m[0], in.of.weighted, sum);
  }
  return sum;
}

// The same where each step of four columns has a scale.
template <Format kFormat>
__device__ __forceinline__ float add_steps(float sum, const unsigned (&q)[8],
                                           const StepScale (&scales)[8], const ChunkCodes& in) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0.0f;
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      const int codes_sum = __dp4a(0x01010101, static_cast<int>(in.codes[i]), 0);
      const int dot = __dp4a(static_cast<int>(q[i]), static_cast<int>(in.codes[i]),
                             -kFormat.offset * codes_sum);
      total = fmaf(scales[i].s, static_cast<float>(dot), total);
      total = fmaf(scales[i].m, static_cast<float>(codes_sum), total);
    }
    sum = fmaf(in.of.scale[half], total, sum);
  }
  return sum;
}

// sum[k][r] += this lane's part of row r of x times row k of w, of 8-bit codes.
template <Format kFormat, int kRows, bool kPicked, int kLoads>
__device__ __forceinline__ void dot_codes(const WeightRow (&w)[kPair], const uint16_t* steps,
                                          int n_chunks, Ahead<kFormat, kPicked, kLoads>& ahead,
                                          const PreparedRows& x, int n, bool again,
                                          float (&sum)[kPair][kRows]) {
  for (int at = 0; at < n_chunks; at += kWarp * kLoads) {
    if (at > 0 || again) ahead.load(w, n_chunks, at);
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int begin = at + u * kWarp;
      if (begin >= n_chunks) break;
      const auto [chunk, here] = chunk_of_lane(begin, n_chunks);
      unsigned q[kPair][8];
      ChunkScales scales[kPair];
      StepScale step_scales[kPair][8];
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
        unpack_codes<kFormat.codes>(ahead.codes[u][k], q[k]);
        if constexpr (!kPicked) scales[k] = decode_scales(kFormat.scales, ahead.scales[u][k]);
      }
      if constexpr (kPicked) {
        const uint4 halves = __ldg(reinterpret_cast<const uint4*>(steps) + chunk);
        const unsigned words[4] = {halves.x, halves.y, halves.z, halves.w};
#pragma unroll
        for (int i = 0; i < kStepsPerChunk; ++i) {
          const int half = (words[i / 2] >> (16 * (i % 2))) & 0xffff;
#pragma unroll
          for (int k = 0; k < kPair; ++k) step_scales[k][i] = half_scale<kFormat>(w[k], half);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (kRows > 1 && r >= n) break;
        const ChunkCodes in = load_input(x, r, chunk);
#pragma unroll
        for (int k = 0; k < kPair; ++k) {
          float s;
          if constexpr (kPicked) {
            s = add_steps<kFormat>(sum[k][r], q[k], step_scales[k], in);
          } else {
            s = add_chunk<kFormat>(sum[k][r], q[k], scales[k], in);
          }
          sum[k][r] = here ? s : sum[k][r];
        }
      }
    }
  }
}

// The same for one row of quantised weights times float32.
template <Format kFormat, int kRows, bool kPicked>
__device__ __forceinline__ void dot_values(const WeightRow& w, const uint16_t* steps, int n_chunks,
                                           const PreparedRows& x, int n, float (&sum)[kRows]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int chunk = lane; chunk < n_chunks; chunk += kWarp) {
    RawCodes raw;
    load_codes<kFormat.codes>(w, chunk, &raw);
    unsigned q[8];
    unpack_codes<kFormat.codes>(raw, q);
    ChunkScales scales{};
    if (!kPicked) scales = decode_scales(kFormat.scales, load_scales(kFormat.scales, w, chunk));
#pragma unroll
    for (int i = 0; i < kStepsPerChunk; ++i) {
      StepScale s{scales.s[i / 4], scales.m[i / 4]};
      if (kPicked) s = half_scale<kFormat>(w, steps[chunk * kStepsPerChunk + i]);
      float values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[j] = s.s * static_cast<float>(code_of(q[i], j) - kFormat.offset) + s.m;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= n) break;
        const float4 v = *reinterpret_cast<const float4*>(
            x.values + r * x.values_stride + static_cast<int64_t>(chunk) * kChunk + 4 * i);
        sum[r] = fmaf(values[0], v.x, sum[r]);
        sum[r] = fmaf(values[1], v.y, sum[r]);
        sum[r] = fmaf(values[2], v.z, sum[r]);
        sum[r] = fmaf(values[3], v.w, sum[r]);
      }
    }
  }
}

// ---- The kernel

// The weights of the first turn are asked for before the kernel waits for its input.
template <DType kType, int kRows, bool kFloats, bool kPicked>
__global__ void __launch_bounds__(kMatvecWarps* kWarp)
    matvec_kernel(COREINFER_PARAMETER MatvecArgs a) {
  constexpr Format kFormat = format_of(kType);
  let_next_start();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // By a shuffle, so that the compiler knows it to be one number for the warp.
  const int warp_here = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kMatvecWarps + warp_here;
  if (warp >= a.n_warps) return wait_for_previous();
  const bool hidden = a.epilogue != Epilogue::kStore;
  const bool gated = hidden && a.n_jobs == 2;
  int number = 0;
  if (!hidden) {
    while (number + 1 < a.n_jobs && warp >= a.jobs[number + 1].first) ++number;
  }
  const MatvecJob& job = a.jobs[number];
  const int64_t row = gated ? warp : (warp - job.first) * kPair;
  const int64_t second = row + 1 < job.w.rows ? row + 1 : row;  // of an odd number the last twice
  const WeightRow w[kPair] = {row_of(job.w, row),
                              gated ? row_of(a.jobs[1].w, row) : row_of(job.w, second)};
  const int n_chunks = job.w.n_chunks;
  constexpr bool kByValues = kFloats && !is_float(kFormat.codes);
  Ahead<kFormat, kPicked, loads_ahead(kFormat.codes, kRows)> ahead;
  if (!kByValues) ahead.load(w, n_chunks, 0);
  // Lane k kRows + r finishes row r of the input with row k of the pair.
  const int k_here = lane / kRows, r_here = lane % kRows;
  const int64_t row_here = row + k_here;
  const bool finishes = k_here < (gated ? 1 : kPair) && row_here < job.w.rows;
  const float bias = finishes && job.bias != nullptr ? job.bias[row_here] : 0.0f;
  wait_for_previous();
  const int n_rows = kRows == 1 ? 1 : a.n_rows;
  if (hidden && warp == 0 && lane < a.zeros) {
    float* to = job.out + job.w.rows + lane;
    for (int r = 0; r < n_rows; ++r) to[r * job.out_stride] = 0.0f;
  }
  for (int first = 0; first < n_rows; first += kRows) {
    const int n = n_rows - first < kRows ? n_rows - first : kRows;
    const bool again = first > 0;
    const bool writes = finishes && r_here < n;
    float* const out = job.out + (first + r_here) * job.out_stride + row_here;
    const float before = writes && !hidden && job.accumulate != 0 ? *out : 0.0f;
    const PreparedRows x = rows_from(a.x, first);
    float sum[kPair][kRows] = {};
    if constexpr (kByValues) {
#pragma unroll
      for (int k = 0; k < kPair; ++k) {
        dot_values<kFormat, kRows, kPicked>(w[k], job.w.steps, n_chunks, x, n, sum[k]);
      }
    } else if constexpr (is_float(kFormat.codes)) {
      dot_floats<kFormat>(w, n_chunks, ahead, x, n, again, sum);
    } else {
      dot_codes<kFormat>(w, job.w.steps, n_chunks, ahead, x, n, again, sum);
    }
    float y = 0.0f, up = 0.0f;
#pragma unroll
    for (int k = 0; k < kPair; ++k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float total = warp_sum(sum[k][r]);
        if (lane == k * kRows + r || (gated && k == 1 && lane == r)) {
          up = y;
          y = total;
        }
      }
    }
    if (!writes) continue;
    if (!hidden) {
      y += bias;
      *out = job.accumulate != 0 ? before + y : y;
      continue;
    }
    // A gate's bias is rare: read here, it takes no register from the sums.
    const float* const gate_bias = gated ? a.jobs[1].bias : nullptr;
    if (gate_bias != nullptr) y += gate_bias[row_here];
    const float act = activated(a.epilogue, a.threshold, gated ? y : y + bias);
    if (a.act_gate != nullptr) a.act_gate[(first + r_here) * a.act_gate_stride + row_here] = act;
    *out = gated ? act * activated_up(a.epilogue, a.threshold, up + bias) : act;
  }
}

template <DType kType, bool kFloats, bool kPicked>
void launch_matvec(Context& context, const MatvecArgs& a) {
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(a.n_warps, kMatvecWarps)));
  const dim3 block(kMatvecWarps * kWarp);
  if constexpr (!kFloats || is_float(format_of(kType).codes)) {
    if (a.n_rows == 1) {
      context.launch(matvec_kernel<kType, 1, kFloats, kPicked>, grid, block, 0, a);
      return;
    }
  }
  context.launch(matvec_kernel<kType, kRowTile, kFloats, kPicked>, grid, block, 0, a);
}

// Each in a file of its own; false where another file has the format.
bool matvec_floats(Context& context, const MatvecArgs& args);
bool matvec_4bit(Context& context, const MatvecArgs& args, bool floats);
bool matvec_other(Context& context, const MatvecArgs& args, bool floats);

template <DType kType>
bool launch_quantised(Context& context, const MatvecArgs& a, bool floats) {
  if (a.jobs[0].w.format() != format_of(kType)) return false;
  const bool picked = a.jobs[0].w.steps != nullptr;
  if (floats && picked) return launch_matvec<kType, true, true>(context, a), true;
  if (floats) return launch_matvec<kType, true, false>(context, a), true;
  if (picked) return launch_matvec<kType, false, true>(context, a), true;
  return launch_matvec<kType, false, false>(context, a), true;
}

}  // namespace coreinfer::cuda
