#include "backend/cpu_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "backend/cpu_backend.h"

namespace coreinfer {
namespace {

// From so many queries on, a block of 16-bit keys or values is widened once for all of them.
constexpr int64_t kWidenFrom = 12;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

}  // namespace

int64_t first_seen(const AttentionSpec& spec, int64_t position) {
  return spec.window == 0 ? 0 : std::max<int64_t>(0, position + 1 - spec.window);
}

void RopeTable::fill() {
  values.resize(static_cast<size_t>(n * 2 * pairs()));
  for (int64_t row = 0; row < n; ++row) {
    float* cos = values.data() + row * 2 * pairs();
    for (int64_t i = 0; i < pairs(); ++i) {
      // In double: at position 100,000 a float32 angle is off by hundredths of a radian.
      const double angle = static_cast<double>(first + row) * (*freq)[static_cast<size_t>(i)];
      cos[i] = static_cast<float>(std::cos(angle)) * scale;
      cos[pairs() + i] = static_cast<float>(std::sin(angle)) * scale;
    }
  }
}

void Sums::clear(int64_t queries, int64_t head_dim) const {
  std::fill_n(out, queries * head_dim, 0.0f);
  std::fill_n(max, queries, kNothing);
  std::fill_n(sum, queries, 0.0f);
}

void Sums::merge(const VectorKernels& vector, Sums later, int64_t queries, int64_t head_dim) const {
  for (int64_t i = 0; i < queries; ++i) {
    if (later.max[i] == kNothing && later.sum[i] == 0.0f) continue;
    const float top = std::max(max[i], later.max[i]);
    const float a = std::exp(max[i] - top);
    const float b = std::exp(later.max[i] - top);
    vector.blend(out + i * head_dim, a, later.out + i * head_dim, b, head_dim);
    sum[i] = sum[i] * a + later.sum[i] * b;
    max[i] = top;
  }
}

Attention::Block Attention::after(Block now) const {
  if (now.block + 1 < end_block()) return {now.head, now.block + 1};
  if (now.head + 1 < spec.n_head_kv) return {now.head + 1, first_block()};
  return now;
}

void Attention::prepare_head(float* x, const Norm& norm, int64_t row) const {
  if (norm.weight) norm_row(vector, norm, x, head_dim(), x);
  if (!rope) return;
  const auto turn = spec.rope == RopeKind::kHalves ? vector.rope_halves : vector.rope_interleaved;
  turn(x, rope->cos(row), rope->sin(row), rope->pairs());
}

void Attention::prepare(int64_t head, int64_t row_begin, int64_t row_end) const {
  const int64_t d = head_dim();
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* key = k.data + row * k.stride + head * d;
    prepare_head(key, spec.k_norm, row);
    cache.store_key(layer, head, first + row, key);
    cache.store_value(layer, head, first + row, v.data + row * v.stride + head * d);
    const int64_t offset = query_offset(head, row);
    float* query = queries + offset;
    std::memcpy(query, q.data + row * q.stride + head * group() * d,
                static_cast<size_t>(group() * d) * sizeof(float));
    for (int64_t g = 0; g < group(); ++g) prepare_head(query + g * d, spec.q_norm, row);
    vector.scale(query, spec.scale, group() * d);
    if (tiles) tiles->split(query, group() * d, high_queries + offset, low_queries + offset);
  }
}

// panel.scores = q . keys for `count` queries, which begin at offset `query`, and the block's first
// `cols` positions.
void Attention::score(Block at, int64_t query, int64_t count, int64_t cols,
                      const Panel& panel) const {
  const int64_t d = head_dim();
  const Block next = after(at);
  const std::byte* keys = cache.key_block(layer, at.head, at.block);
  const std::byte* ahead = cache.key_block(layer, next.head, next.block);
  const float* q = queries + query;
  float* scores = panel.scores.as<float>();
  const auto multiply = [&](const float* wide, const float* wide_ahead) {
    kernels.multiply_f32(q, d, wide, kKvBlock, scores, kKvBlock, count, d, cols, false, wide_ahead);
  };
  switch (cache.spec().type_k) {
    case KvType::kF32:
      return multiply(reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(ahead));
    case KvType::kF16: {
      const auto* halves = reinterpret_cast<const uint16_t*>(keys);
      if (count < kWidenFrom) {
        return kernels.multiply_f16(q, d, halves, kKvBlock, scores, kKvBlock, count, d, cols, false,
                                    reinterpret_cast<const uint16_t*>(ahead));
      }
      kernels.f16_to_f32(halves, d * kKvBlock, panel.keys.as<float>());
      break;
    }
    case KvType::kQ8_0:
      unpack_keys(keys, panel);
      break;
  }
  multiply(panel.keys.as<float>(), nullptr);
}

void Attention::unpack_keys(const std::byte* keys, const Panel& panel) const {
  const int64_t d = head_dim();
  kernels.unpack_block(reinterpret_cast<const int8_t*>(keys),
                       reinterpret_cast<const uint16_t*>(keys + d * kKvBlock), d,
                       panel.keys.as<float>());
}

// The same on tiles, for all positions of the block. Keys and queries are bf16 with a second bf16
// for the rest: some models have keys in the hundreds, whose rounding would show in every score.
void Attention::score_tiles(int64_t head, int64_t block, int64_t query, int64_t count,
                            const Panel& panel) const {
  const int64_t d = head_dim();
  const std::byte* keys = cache.key_block(layer, head, block);
  auto* high = panel.key_pairs.as<uint16_t>();
  uint16_t* low = high + d * kKvBlock;
  if (cache.spec().type_k == KvType::kF16) {
    tiles->pair_f16(reinterpret_cast<const uint16_t*>(keys), kKvBlock, d, kKvBlock, high, low);
  } else {
    const bool packed = cache.spec().type_k == KvType::kQ8_0;
    if (packed) unpack_keys(keys, panel);
    tiles->pair_f32(packed ? panel.keys.as<float>() : reinterpret_cast<const float*>(keys),
                    kKvBlock, d, kKvBlock, high, low);
  }
  tiles->multiply({high_queries + query, low_queries + query, d}, {high, low, kKvBlock},
                  panel.scores.as<float>(), kKvBlock, count, d, kKvBlock, false);
}

// out += panel.scores . values over the block's first `depth` positions.
void Attention::add_values(Block at, int64_t count, int64_t depth, const Panel& panel,
                           float* out) const {
  const int64_t d = head_dim();
  const Block next = after(at);
  const std::byte* values = cache.value_row(layer, at.head, at.block * kKvBlock);
  const std::byte* ahead = cache.value_row(layer, next.head, next.block * kKvBlock);
  const float* weights = panel.scores.as<float>();
  const auto multiply = [&](const float* wide, const float* wide_ahead) {
    kernels.multiply_f32(weights, kKvBlock, wide, d, out, d, count, depth, d, true, wide_ahead);
  };
  switch (cache.spec().type_v) {
    case KvType::kF32:
      return multiply(reinterpret_cast<const float*>(values),
                      reinterpret_cast<const float*>(ahead));
    case KvType::kF16: {
      const auto* halves = reinterpret_cast<const uint16_t*>(values);
      if (count < kWidenFrom) {
        return kernels.multiply_f16(weights, kKvBlock, halves, d, out, d, count, depth, d, true,
                                    reinterpret_cast<const uint16_t*>(ahead));
      }
      kernels.f16_to_f32(halves, depth * d, panel.values.as<float>());
      break;
    }
    case KvType::kQ8_0:
      unpack_values(values, depth, panel);
      break;
  }
  multiply(panel.values.as<float>(), nullptr);
}

void Attention::unpack_values(const std::byte* values, int64_t depth, const Panel& panel) const {
  const int64_t d = head_dim();
  for (int64_t j = 0; j < depth; ++j) {
    const std::byte* row = values + static_cast<size_t>(j) * cache.value_row_bytes();
    kernels.unpack_row(reinterpret_cast<const int8_t*>(row),
                       reinterpret_cast<const uint16_t*>(row + d), d,
                       panel.values.as<float>() + j * d);
  }
}

// The same on tiles: weights and values rounded to bf16, as the products around attention round
// their inputs in a large batch.
void Attention::add_values_tiles(int64_t head, int64_t block, int64_t count, int64_t depth,
                                 const Panel& panel, float* out) const {
  constexpr int64_t kRows = TileKernels::kRows, kMultiple = TileKernels::kMultiple;
  const int64_t d = head_dim();
  const std::byte* values = cache.value_row(layer, head, block * kKvBlock);
  auto* pairs = panel.value_pairs.as<uint16_t>();
  auto* weights = panel.weights.as<uint16_t>();
  if (cache.spec().type_v == KvType::kF16) {
    tiles->pair_f16(reinterpret_cast<const uint16_t*>(values), d, depth, d, pairs, nullptr);
  } else {
    const bool packed = cache.spec().type_v == KvType::kQ8_0;
    if (packed) unpack_values(values, depth, panel);
    tiles->pair_f32(packed ? panel.values.as<float>() : reinterpret_cast<const float*>(values), d,
                    depth, d, pairs, nullptr);
  }
  tiles->split(panel.scores.as<float>(), count * kKvBlock, weights, nullptr);
  // Rows that fill the last tile add nothing to what lies behind.
  const int64_t past = (count + kRows - 1) / kRows * kRows - count;
  std::memset(weights + count * kKvBlock, 0, static_cast<size_t>(past * kKvBlock) * 2);
  tiles->multiply({weights, nullptr, kKvBlock}, {pairs, nullptr, d}, out, d, count,
                  (depth + kMultiple - 1) / kMultiple * kMultiple, d, true);
}

void Attention::pass(int64_t head, int64_t row_begin, int64_t n_rows, int64_t block_begin,
                     int64_t block_end, const Panel& panel, Sums sums) const {
  const int64_t d = head_dim();
  const int64_t base = first + row_begin;  // position of the first row
  float* scores = panel.scores.as<float>();
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t start = block * kKvBlock;
    // Rows [r0, r1) see some position of the block: those at or after its start, and with a window
    // those that have not left it behind.
    const int64_t r0 = std::clamp<int64_t>(start - base, 0, n_rows);
    const int64_t r1 = spec.window == 0 ? n_rows
                                        : std::clamp<int64_t>(
                                              start + kKvBlock - 1 + spec.window - base, 0, n_rows);
    if (r0 >= r1) continue;
    const int64_t cols = std::min(kKvBlock, base + r1 - start);
    const int64_t q0 = r0 * group();
    const int64_t queries = (r1 - r0) * group();
    const int64_t query = query_offset(head, row_begin + r0);
    if (tiles) {
      score_tiles(head, block, query, queries, panel);
    } else {
      score({head, block}, query, queries, std::min(kKvBlock, (cols + 15) / 16 * 16), panel);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t position = base + r0 + i / group();
      const int64_t end = std::min(kKvBlock, position + 1 - start);
      const int64_t begin =
          spec.window == 0 ? 0 : std::max<int64_t>(0, position + 1 - spec.window - start);
      const float correction =
          kernels.softmax(scores + i * kKvBlock, tiles ? kKvBlock : cols, begin, end, spec.softcap,
                          sums.max + q0 + i, sums.sum + q0 + i);
      if (correction != 1.0f) vector.scale(sums.out + (q0 + i) * d, correction, d);
    }
    if (tiles) {
      add_values_tiles(head, block, queries, cols, panel, sums.out + q0 * d);
    } else {
      add_values({head, block}, queries, cols, panel, sums.out + q0 * d);
    }
  }
}

void Attention::finish(int64_t head, int64_t row_begin, int64_t n_rows, Sums sums) const {
  const int64_t d = head_dim();
  for (int64_t i = 0; i < n_rows * group(); ++i) {
    float* to =
        out.data + (row_begin + i / group()) * out.stride + (head * group() + i % group()) * d;
    std::memcpy(to, sums.out + i * d, static_cast<size_t>(d) * sizeof(float));
    vector.scale(to, 1.0f / sums.sum[i], d);
  }
}

}  // namespace coreinfer
