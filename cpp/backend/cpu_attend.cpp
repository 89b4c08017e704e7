// Attention on the CPU: one pass over blocks of cached positions with a running maximum and sum
// (online softmax), all query heads of a key-value head together, so that keys and values are read
// once.
//
// Up to kExactRows rows: positions are cut into spans of kSpan, counted from position 0. A span is
// one piece of work; its result is merged into the row's in the order of spans. What a row adds up,
// and in which order, thus follows from its position alone, and one row at a long context still
// keeps every thread busy. Larger batches: a group of rows runs over all its blocks in one piece.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/cpu_backend.h"
#include "backend/cpu_kv_cache.h"
#include "base/aligned_buffer.h"
#include "base/error.h"
#include "kernels/attention_block.h"
#include "kernels/vector.h"

namespace coreinfer {
namespace {

constexpr int64_t kSpan = 4 * kKvBlock;
// Queries that run over the blocks together in a large batch; their results stay in the
// second-level cache.
constexpr int64_t kBatchQueries = 128;
// From so many queries on, a block of 16-bit keys or values is widened once for all of them.
constexpr int64_t kWidenFrom = 12;
// Floats of span results that wait for being merged (16 MiB).
constexpr int64_t kPartialFloats = int64_t{1} << 22;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// cos and sin of every pair at positions [first, first + n): (n, 2, dim / 2).
struct RopeTable {
  std::shared_ptr<const std::vector<float>> freq;  // kept, so that its address stays its own
  float scale = 0.0f;
  int64_t first = 0;
  int64_t n = 0;
  std::vector<float> values;

  const float* cos(int64_t row) const { return values.data() + row * 2 * pairs(); }
  const float* sin(int64_t row) const { return cos(row) + pairs(); }
  int64_t pairs() const { return static_cast<int64_t>(freq->size()); }
};

// What a thread needs while it passes over blocks.
struct Panel {
  AlignedBuffer keys;    // (head_dim, kKvBlock)
  AlignedBuffer values;  // (kKvBlock, head_dim)
  AlignedBuffer scores;  // (queries, kKvBlock)
  AlignedBuffer sums;    // of large batches: Sums of a piece of work
  // With matrix tiles, in bf16: keys high and low, values, weights.
  AlignedBuffer key_pairs;    // (2, head_dim / 2, kKvBlock, 2)
  AlignedBuffer value_pairs;  // (kKvBlock / 2, head_dim, 2)
  AlignedBuffer weights;      // (queries, kKvBlock)
};

// The running softmax of some queries: sum of weighted values, maximum, sum of weights.
struct Sums {
  float* out;  // (queries, head_dim)
  float* max;
  float* sum;

  static Sums at(float* memory, int64_t queries, int64_t head_dim) {
    return {memory, memory + queries * head_dim, memory + queries * (head_dim + 1)};
  }
  static int64_t floats(int64_t queries, int64_t head_dim) { return queries * (head_dim + 2); }
  void clear(int64_t queries, int64_t head_dim) const {
    std::fill_n(out, queries * head_dim, 0.0f);
    std::fill_n(max, queries, kNothing);
    std::fill_n(sum, queries, 0.0f);
  }
};

}  // namespace

struct AttendScratch {
  std::array<RopeTable, 4> rope;  // layers differ in a few tables at most
  size_t oldest_rope = 0;
  AlignedBuffer queries;       // (n_head_kv, rows, group, head_dim): rotated and scaled
  AlignedBuffer bf16_queries;  // (2, …) the same as high and low, where there are tiles
  AlignedBuffer partials;      // Sums of (span, kv head)
  AlignedBuffer totals;        // Sums of kv heads
  std::vector<Panel> panels;   // per thread

  const RopeTable& rope_table(const AttentionSpec& spec, int64_t first, int64_t n);
};

const RopeTable& AttendScratch::rope_table(const AttentionSpec& spec, int64_t first, int64_t n) {
  for (const RopeTable& t : rope) {
    if (t.freq == spec.rope_freq && t.scale == spec.rope_scale && t.first == first && t.n == n) {
      return t;
    }
  }
  RopeTable& t = rope[oldest_rope];
  oldest_rope = (oldest_rope + 1) % rope.size();
  t.freq = spec.rope_freq;
  t.scale = spec.rope_scale;
  t.first = first;
  t.n = n;
  const int64_t pairs = t.pairs();
  t.values.resize(static_cast<size_t>(n * 2 * pairs));
  for (int64_t row = 0; row < n; ++row) {
    float* cos = t.values.data() + row * 2 * pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      // In double: at position 100,000 a float32 angle is off by hundredths of a radian.
      const double angle = static_cast<double>(first + row) * (*t.freq)[static_cast<size_t>(i)];
      cos[i] = static_cast<float>(std::cos(angle)) * t.scale;
      cos[pairs + i] = static_cast<float>(std::sin(angle)) * t.scale;
    }
  }
  return t;
}

namespace {

// One call of attend: what all its pieces of work share.
struct Attention {
  const AttentionSpec& spec;
  CpuKvCache& cache;
  const VectorKernels& vector;
  const AttentionKernels& kernels;
  const RopeTable* rope;  // null: none
  Rows q, k, v, out;
  int64_t layer;
  int64_t first;
  float* queries;
  const TileKernels* tiles;  // null: products in float32
  uint16_t* high_queries;
  uint16_t* low_queries;

  int64_t n() const { return q.n; }
  int64_t group() const { return spec.n_head / spec.n_head_kv; }
  int64_t head_dim() const { return spec.head_dim; }
  int64_t query_offset(int64_t head, int64_t row) const {
    return (head * n() + row) * group() * head_dim();
  }

  void prepare(int64_t head, int64_t row_begin, int64_t row_end) const;
  void pass(int64_t head, int64_t row_begin, int64_t n_rows, int64_t block_begin, int64_t block_end,
            const Panel& panel, Sums sums) const;
  void finish(int64_t head, int64_t row_begin, int64_t n_rows, Sums sums) const;

 private:
  void prepare_head(float* x, const Norm& norm, int64_t row) const;
  void score(int64_t head, int64_t block, int64_t query, int64_t count, int64_t cols,
             const Panel& panel) const;
  void score_tiles(int64_t head, int64_t block, int64_t query, int64_t count,
                   const Panel& panel) const;
  void add_values(int64_t head, int64_t block, int64_t count, int64_t depth, const Panel& panel,
                  float* out) const;
  void add_values_tiles(int64_t head, int64_t block, int64_t count, int64_t depth,
                        const Panel& panel, float* out) const;
  void unpack_keys(const std::byte* keys, const Panel& panel) const;
  void unpack_values(const std::byte* values, int64_t depth, const Panel& panel) const;
};

void Attention::prepare_head(float* x, const Norm& norm, int64_t row) const {
  if (norm.weight) norm_row(vector, norm, x, head_dim(), x);
  if (!rope) return;
  const auto turn = spec.rope == RopeKind::kHalves ? vector.rope_halves : vector.rope_interleaved;
  turn(x, rope->cos(row), rope->sin(row), rope->pairs());
}

// Head norms and rope; keys and values go to the cache, queries to their own place.
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
void Attention::score(int64_t head, int64_t block, int64_t query, int64_t count, int64_t cols,
                      const Panel& panel) const {
  const int64_t d = head_dim();
  const std::byte* keys = cache.key_block(layer, head, block);
  const float* q = queries + query;
  float* scores = panel.scores.as<float>();
  const float* wide = panel.keys.as<float>();
  switch (cache.spec().type_k) {
    case KvType::kF32:
      wide = reinterpret_cast<const float*>(keys);
      break;
    case KvType::kF16: {
      const auto* halves = reinterpret_cast<const uint16_t*>(keys);
      if (count < kWidenFrom) {
        return kernels.multiply_f16(q, d, halves, kKvBlock, scores, kKvBlock, count, d, cols,
                                    false);
      }
      kernels.f16_to_f32(halves, d * kKvBlock, panel.keys.as<float>());
      break;
    }
    case KvType::kQ8_0:
      unpack_keys(keys, panel);
      break;
  }
  kernels.multiply_f32(q, d, wide, kKvBlock, scores, kKvBlock, count, d, cols, false);
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
void Attention::add_values(int64_t head, int64_t block, int64_t count, int64_t depth,
                           const Panel& panel, float* out) const {
  const int64_t d = head_dim();
  const std::byte* values = cache.value_row(layer, head, block * kKvBlock);
  const float* weights = panel.scores.as<float>();
  const float* wide = panel.values.as<float>();
  switch (cache.spec().type_v) {
    case KvType::kF32:
      wide = reinterpret_cast<const float*>(values);
      break;
    case KvType::kF16: {
      const auto* halves = reinterpret_cast<const uint16_t*>(values);
      if (count < kWidenFrom) {
        return kernels.multiply_f16(weights, kKvBlock, halves, d, out, d, count, depth, d, true);
      }
      kernels.f16_to_f32(halves, depth * d, panel.values.as<float>());
      break;
    }
    case KvType::kQ8_0:
      unpack_values(values, depth, panel);
      break;
  }
  kernels.multiply_f32(weights, kKvBlock, wide, d, out, d, count, depth, d, true);
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

// Adds what the given rows see in blocks [block_begin, block_end) to sums, which begin at
// row_begin.
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
      score(head, block, query, queries, std::min(kKvBlock, (cols + 15) / 16 * 16), panel);
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
      add_values(head, block, queries, cols, panel, sums.out + q0 * d);
    }
  }
}

// Divides by the sum of weights and hands out the rows.
void Attention::finish(int64_t head, int64_t row_begin, int64_t n_rows, Sums sums) const {
  const int64_t d = head_dim();
  for (int64_t i = 0; i < n_rows * group(); ++i) {
    float* to =
        out.data + (row_begin + i / group()) * out.stride + (head * group() + i % group()) * d;
    std::memcpy(to, sums.out + i * d, static_cast<size_t>(d) * sizeof(float));
    vector.scale(to, 1.0f / sums.sum[i], d);
  }
}

// total := total and then part, query by query; a part that saw nothing changes nothing.
void merge(const VectorKernels& vector, Sums total, Sums part, int64_t queries, int64_t head_dim) {
  for (int64_t i = 0; i < queries; ++i) {
    if (part.max[i] == kNothing && part.sum[i] == 0.0f) continue;
    const float max = std::max(total.max[i], part.max[i]);
    const float a = std::exp(total.max[i] - max);
    const float b = std::exp(part.max[i] - max);
    vector.blend(total.out + i * head_dim, a, part.out + i * head_dim, b, head_dim);
    total.sum[i] = total.sum[i] * a + part.sum[i] * b;
    total.max[i] = max;
  }
}

void check(const AttentionSpec& spec, const KvSpec& kv, Rows q, Rows k, Rows v, int64_t layer,
           int64_t first, Rows out) {
  const auto fail = [](const char* what, int64_t found, int64_t expected) {
    throw_error(ErrorKind::kValue, "attend: %s is %lld, expected %lld", what,
                static_cast<long long>(found), static_cast<long long>(expected));
  };
  if (spec.n_head < 1 || spec.n_head_kv < 1 || spec.n_head % spec.n_head_kv != 0) {
    fail("n_head modulo n_head_kv", spec.n_head_kv < 1 ? -1 : spec.n_head % spec.n_head_kv, 0);
  }
  if (spec.head_dim != kv.head_dim) fail("head_dim", spec.head_dim, kv.head_dim);
  if (spec.n_head_kv * spec.head_dim != kv.row_width) {
    fail("the width of keys", spec.n_head_kv * spec.head_dim, kv.row_width);
  }
  if (q.width != spec.n_head * spec.head_dim)
    fail("q's width", q.width, spec.n_head * spec.head_dim);
  if (out.width != q.width) fail("out's width", out.width, q.width);
  if (k.width != kv.row_width) fail("k's width", k.width, kv.row_width);
  if (v.width != kv.row_width) fail("v's width", v.width, kv.row_width);
  if (k.n != q.n) fail("rows of k", k.n, q.n);
  if (v.n != q.n) fail("rows of v", v.n, q.n);
  if (out.n != q.n) fail("rows of out", out.n, q.n);
  if (spec.rope != RopeKind::kNone) {
    const auto pairs = spec.rope_freq ? static_cast<int64_t>(spec.rope_freq->size()) : 0;
    if (pairs < 1 || pairs * 2 != spec.rope_dim) fail("rope frequencies", pairs, spec.rope_dim / 2);
    if (spec.rope_dim > spec.head_dim) fail("rope_dim", spec.rope_dim, spec.head_dim);
  }
  for (const Norm* norm : {&spec.q_norm, &spec.k_norm}) {
    if (norm->weight && norm->weight->size() != spec.head_dim) {
      fail("a head norm's size", norm->weight->size(), spec.head_dim);
    }
  }
  if (layer < 0 || layer >= kv.n_layer || first < 0 || first + q.n > kv.n_ctx) {
    throw_error(ErrorKind::kValue,
                "attend: positions %lld to %lld of layer %lld do not fit a KV cache of %lld "
                "positions and %lld layers",
                static_cast<long long>(first), static_cast<long long>(first + q.n - 1),
                static_cast<long long>(layer), static_cast<long long>(kv.n_ctx),
                static_cast<long long>(kv.n_layer));
  }
}

}  // namespace

void CpuBackend::attend(const AttentionSpec& spec, Rows q, Rows k, Rows v, KvCache& cache,
                        int64_t layer, int64_t first, Rows out) {
  check(spec, cache.spec(), q, k, v, layer, first, out);
  if (q.n < 1) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!attend_scratch_) attend_scratch_ = std::make_shared<AttendScratch>();
  AttendScratch& s = *attend_scratch_;
  auto& kv = static_cast<CpuKvCache&>(cache);

  const int64_t n = q.n;
  const int64_t d = spec.head_dim;
  const int64_t heads = spec.n_head_kv;
  const int64_t group = spec.n_head / heads;
  const bool exact = n <= kExactRows;
  const int64_t rows_together = exact ? n : std::max<int64_t>(1, kBatchQueries / group);
  const int64_t queries = rows_together * group;  // of a piece of work
  const auto bytes = [](int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); };

  // Matrix tiles for large batches, unless every activation is to stay float32.
  const AttentionKernels& kernels = attention_kernels(isa_);
  const TileKernels* tiles = exact || options_.f32_activations || d % TileKernels::kMultiple != 0
                                 ? nullptr
                                 : kernels.tiles;
  const int64_t past = tiles ? TileKernels::kRows : 0;  // room to read and write whole tiles
  const int64_t all_queries = n * spec.n_head * d;
  s.queries.ensure(bytes(all_queries));
  if (tiles) s.bf16_queries.ensure(bytes(all_queries + past * d));
  s.panels.resize(static_cast<size_t>(pool_.n_threads()));
  for (Panel& panel : s.panels) {
    panel.keys.ensure(bytes(d * kKvBlock));
    panel.values.ensure(bytes(d * kKvBlock));
    panel.scores.ensure(bytes((queries + past) * kKvBlock));
    if (!exact) panel.sums.ensure(bytes(Sums::floats(queries + past, d)));
    if (!tiles) continue;
    panel.key_pairs.ensure(bytes(d * kKvBlock));
    panel.value_pairs.ensure(bytes(d * kKvBlock));
    panel.weights.ensure(bytes((queries + past) * kKvBlock));
  }
  const RopeTable* rope = spec.rope == RopeKind::kNone ? nullptr : &s.rope_table(spec, first, n);
  auto* bf16 = s.bf16_queries.as<uint16_t>();
  const Attention attention{.spec = spec,
                            .cache = kv,
                            .vector = vector_kernels(isa_),
                            .kernels = kernels,
                            .rope = rope,
                            .q = q,
                            .k = k,
                            .v = v,
                            .out = out,
                            .layer = layer,
                            .first = first,
                            .queries = s.queries.as<float>(),
                            .tiles = tiles,
                            .high_queries = bf16,
                            .low_queries = bf16 + all_queries + past * d};

  // Spans of an exact call, taken in waves whose results fit the partial sums.
  const int64_t lowest = spec.window == 0 ? 0 : std::max<int64_t>(0, first + 1 - spec.window);
  const int64_t span_begin = lowest / kSpan;
  const int64_t span_end = (first + n - 1) / kSpan + 1;
  const int64_t part_floats = Sums::floats(queries, d);
  const int64_t wave =
      std::clamp<int64_t>(kPartialFloats / (heads * part_floats), 1, span_end - span_begin);
  if (exact) {
    s.partials.ensure(bytes(wave * heads * part_floats));
    s.totals.ensure(bytes(heads * part_floats));
  }

  const int64_t first_block = first / kKvBlock;
  const int64_t row_blocks = (first + n - 1) / kKvBlock + 1 - first_block;
  pool_.run([&](ThreadPool::Context& context) {
    const Panel& panel = s.panels[static_cast<size_t>(context.thread())];
    int64_t begin, end;
    // Rows of one block of positions at a time, since keys of a block share cache lines.
    while (context.next(heads * row_blocks, 1, &begin, &end)) {
      const int64_t start = (first_block + begin % row_blocks) * kKvBlock - first;
      attention.prepare(begin / row_blocks, std::max<int64_t>(0, start),
                        std::min(n, start + kKvBlock));
    }
    context.barrier();
    if (!exact) {
      const int64_t groups = (n + rows_together - 1) / rows_together;
      const Sums sums = Sums::at(panel.sums.as<float>(), queries + past, d);
      while (context.next(heads * groups, 1, &begin, &end)) {
        // The last rows see most: they go first.
        const int64_t row = (groups - 1 - begin / heads) * rows_together;
        const int64_t count = std::min(rows_together, n - row);
        const int64_t from =
            spec.window == 0 ? 0 : std::max<int64_t>(0, first + row + 1 - spec.window);
        sums.clear(queries, d);
        attention.pass(begin % heads, row, count, from / kKvBlock,
                       (first + row + count - 1) / kKvBlock + 1, panel, sums);
        attention.finish(begin % heads, row, count, sums);
      }
      return;
    }
    const auto total_of = [&](int64_t head) {
      return Sums::at(s.totals.as<float>() + head * part_floats, queries, d);
    };
    const auto part_of = [&](int64_t part) {
      return Sums::at(s.partials.as<float>() + part * part_floats, queries, d);
    };
    for (int64_t at = span_begin; at < span_end; at += wave) {
      const int64_t spans = std::min(wave, span_end - at);
      while (context.next(spans * heads, 1, &begin, &end)) {
        const int64_t span = at + begin / heads;
        const Sums part = part_of(begin);
        part.clear(queries, d);
        attention.pass(begin % heads, 0, n, span * (kSpan / kKvBlock),
                       std::min((span + 1) * (kSpan / kKvBlock), first_block + row_blocks), panel,
                       part);
      }
      context.barrier();
      while (context.next(heads, 1, &begin, &end)) {
        const Sums total = total_of(begin);
        if (at == span_begin) total.clear(queries, d);
        for (int64_t i = 0; i < spans; ++i) {
          merge(attention.vector, total, part_of(i * heads + begin), queries, d);
        }
        if (at + spans == span_end) attention.finish(begin, 0, n, total);
      }
      if (at + spans < span_end) context.barrier();
    }
  });
  kv.mark_written(layer, first + n);
}

}  // namespace coreinfer
