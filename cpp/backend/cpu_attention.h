// The work inside one call of attend(): rows are prepared (head norms, rope, keys and values into
// the cache), queries pass over blocks of cached positions with a running maximum and sum (online
// softmax), results of passes are merged and handed out. All query heads of a key-value head go
// together, so that keys and values are read once. Which thread does what, and in which pieces, is
// for cpu_attend.cpp to say.
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu_kv_cache.h"
#include "base/aligned_buffer.h"
#include "kernels/attention_block.h"
#include "kernels/vector.h"

namespace coreinfer {

// The first position that a row at `position` sees.
int64_t first_seen(const AttentionSpec& spec, int64_t position);

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
  void fill();  // values, for the members before it
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
  void clear(int64_t queries, int64_t head_dim) const;
  // This := this and then `later`, query by query; what saw nothing changes nothing.
  void merge(const VectorKernels& vector, Sums later, int64_t queries, int64_t head_dim) const;
};

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

  // The blocks that some row sees: [first_block(), end_block()).
  int64_t first_block() const { return first_seen(spec, first) / kKvBlock; }
  int64_t end_block() const { return (first + n() - 1) / kKvBlock + 1; }

  // Head norms and rope; keys and values go to the cache, queries to their own place.
  void prepare(int64_t head, int64_t row_begin, int64_t row_end) const;
  // Adds what rows [row_begin, row_begin + n_rows) see in blocks [block_begin, block_end) to sums,
  // whose first query is the first of row_begin.
  void pass(int64_t head, int64_t row_begin, int64_t n_rows, int64_t block_begin, int64_t block_end,
            const Panel& panel, Sums sums) const;
  // Divides by the sums of weights and hands out the rows.
  void finish(int64_t head, int64_t row_begin, int64_t n_rows, Sums sums) const;

 private:
  struct Block {
    int64_t head, block;
  };
  // What is passed over after a block: the head's next one, then the next head's first.
  Block after(Block now) const;
  void prepare_head(float* x, const Norm& norm, int64_t row) const;
  void score(Block at, int64_t query, int64_t count, int64_t cols, const Panel& panel) const;
  void score_tiles(int64_t head, int64_t block, int64_t query, int64_t count,
                   const Panel& panel) const;
  void add_values(Block at, int64_t count, int64_t depth, const Panel& panel, float* out) const;
  void add_values_tiles(int64_t head, int64_t block, int64_t count, int64_t depth,
                        const Panel& panel, float* out) const;
  void unpack_keys(const std::byte* keys, const Panel& panel) const;
  void unpack_values(const std::byte* values, int64_t depth, const Panel& panel) const;
};

}  // namespace coreinfer
