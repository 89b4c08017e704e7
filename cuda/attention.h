// Attention: head norms and rope, keys and values into the cache, then for every row a softmax over
// the positions up to its own. Positions are cut into spans counted from position 0; spans run side
// by side and are merged in order, so the bits of a row of attend_rows follow from its own position
// alone. attend_tiles is for many rows: those of a tile share each read of keys and values. A file
// for each: attention_rope.cu, attention_rows.cu, attention_tiles.cu.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "backend/backend.h"
#include "context.h"
#include "kv_cache.h"
#include "prepare.h"

namespace coreinfer::cuda {

// Positions of a span.
inline constexpr int kSpan = 128;
// Query heads of a key-value head that share a pass over its keys.
inline constexpr int kMaxGroup = 8;

struct AttentionCall {
  Rows q, k, v, out;
  KvPlane keys, values;
  int64_t n_ctx;
  const int32_t* position;   // device memory, or null: 0
  int64_t first;             // row 0 is at *position + first
  const float* frequencies;  // device memory (rope_dim / 2), null without rope
  float* partials;           // device memory: what partial_bytes_of_rows or partial_floats say
  int32_t* arrived;          // device memory for attend_rows, (kExactRows * n_head), zeros
  PreparedRows prepared;     // attend_rows makes codes of out, too, unless null
  int64_t n_spans;           // that the grid covers, at least those up to the last row's position
  int64_t span;              // positions of one; kSpan for attend_rows
};

// What spans leave behind until they are merged takes no more; with 8 heads of 128 on one key-value
// head that is up to two million positions, from where on it is what their part of a row takes.
inline constexpr size_t kPartialBytes = size_t{64} << 20;
// Floats that the spans of n rows leave behind.
int64_t partial_floats(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans);

// Rotates q in place (unscaled), stores k and v at their positions; attend_rows does so itself.
void rope_and_store(Context& context, const AttentionSpec& spec, const AttentionCall& call);

// Memory for partials of attend_rows; with less than all rows would take, some come after others,
// and of a row some heads.
size_t partial_bytes_of_rows(const AttentionSpec& spec, int64_t n_rows, int64_t n_spans);
void attend_rows(Context& context, const AttentionSpec& spec, const AttentionCall& call);

// Sets n_spans and span so that n rows up to position `end` occupy the device; with one span no
// partials are needed.
void choose_spans(const Context& context, const AttentionSpec& spec, int64_t n, int64_t end,
                  AttentionCall* call);
void attend_tiles(Context& context, const AttentionSpec& spec, const AttentionCall& call);

}  // namespace coreinfer::cuda
