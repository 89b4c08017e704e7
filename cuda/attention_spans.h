// What the kernels of attention_rows.cu and attention_tiles.cu have in common: their arguments, how
// they read a cache, and where the sums over a span of positions lie until they are merged.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "attention.h"

namespace coreinfer::cuda {

struct AttentionArgs {
  const float* q;
  int64_t q_stride;
  KvPlane keys, values;
  const int32_t* position;  // null: 0
  int64_t first;            // row 0 is at *position + first
  int64_t n_rows;
  int64_t window;
  int64_t span, n_spans;  // positions of a span, and how many the grid covers
  float* partials;        // (row, head, span): head_dim sums, then maximum, then sum of weights
  int32_t* arrived;       // attend_rows: (row, heads of a block), spans that are done
  float* out;
  int64_t out_stride;
  PreparedRows prepared;  // attend_rows: codes of out, too, where not null
  float scale, softcap;
  int32_t n_head, n_head_kv, head_dim;
  // attend_rows takes heads in parts of what a block does: the launch's first part, and heads from
  // the first one on of those that have partials.
  int32_t first_part, first_head, n_partial_heads;
};
AttentionArgs arguments(const AttentionSpec& spec, const AttentionCall& call);

// From the partials of attend_tiles to out, the spans of a row in order.
void merge_spans(Context& context, const AttentionArgs& args);

__device__ __forceinline__ int64_t first_position(const AttentionArgs& a) {
  return a.first + (a.position != nullptr ? *a.position : 0);
}

__device__ __forceinline__ float* partial_of(const AttentionArgs& a, int64_t row, int head,
                                             int64_t span) {
  const int64_t place = row * a.n_partial_heads + head - a.first_head;
  return a.partials + (place * a.n_spans + span) * (a.head_dim + 2);
}

// Eight elements of a row of the cache as they lie there.
struct RawElements {
  uint4 a, b;  // f16: a; f32: both; q8_0: a.x, a.y, and the scale in a.z
};

template <KvElement kElement>
__device__ __forceinline__ RawElements load_raw(const KvPlane& plane, const unsigned char* head,
                                                int64_t head_dim, int64_t position, int at) {
  const int64_t element = position * head_dim + at;
  RawElements raw;
  if constexpr (kElement == KvElement::kF16) {
    raw.a = *reinterpret_cast<const uint4*>(head + 2 * element);
  } else if constexpr (kElement == KvElement::kF32) {
    const auto* from = reinterpret_cast<const uint4*>(head + 4 * element);
    raw.a = from[0];
    raw.b = from[1];
  } else {
    const uint2 codes = *reinterpret_cast<const uint2*>(head + element);
    const auto* scales = reinterpret_cast<const uint16_t*>(head + plane.scales_start);
    raw.a.x = codes.x;
    raw.a.y = codes.y;
    raw.a.z = scales[position * (head_dim / kKvGroup) + at / kKvGroup];
  }
  return raw;
}

template <KvElement kElement>
__device__ __forceinline__ void values_of(const RawElements& raw, float (&v)[8]) {
  const unsigned words[8] = {raw.a.x, raw.a.y, raw.a.z, raw.a.w,
                             raw.b.x, raw.b.y, raw.b.z, raw.b.w};
  if constexpr (kElement == KvElement::kF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = half_to_float(static_cast<uint16_t>(words[i]));
      v[2 * i + 1] = half_to_float(static_cast<uint16_t>(words[i] >> 16));
    }
  } else if constexpr (kElement == KvElement::kF32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(words[i]);
  } else {
    const float scale = half_to_float(static_cast<uint16_t>(words[2]));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = scale * static_cast<float>(static_cast<int8_t>(words[i / 4] >> (8 * (i % 4))));
    }
  }
}

template <KvElement kElement>
struct ElementIs {
  static constexpr KvElement value = kElement;
};
// work(ElementIs<element>{}), so that loops over a cache do not ask what it holds.
template <typename Work>
__device__ __forceinline__ void with_element(KvElement element, const Work& work) {
  if (element == KvElement::kF16) {
    work(ElementIs<KvElement::kF16>{});
  } else if (element == KvElement::kF32) {
    work(ElementIs<KvElement::kF32>{});
  } else {
    work(ElementIs<KvElement::kQ8>{});
  }
}

// Eight elements from `at` on of a row of the cache.
__device__ __forceinline__ void load8(const KvPlane& plane, const unsigned char* head,
                                      int64_t head_dim, int64_t position, int at, float (&v)[8]) {
  with_element(plane.element, [&](auto element) {
    constexpr KvElement kElement = decltype(element)::value;
    values_of<kElement>(load_raw<kElement>(plane, head, head_dim, position, at), v);
  });
}

}  // namespace coreinfer::cuda
