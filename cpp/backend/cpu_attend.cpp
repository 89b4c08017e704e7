// How one call of attend() is dealt to the threads.
//
// Up to kExactRows rows: positions are cut into spans of kSpan, counted from position 0. A span's
// result is merged into the row's in the order of spans. What a row adds up, and in which order,
// thus follows from its position alone. Where key-value heads keep every thread busy, a thread does
// all that a head needs, and nobody waits; else a span is a piece of work of its own, for one row
// at a long context. Larger batches: a group of rows runs over all its blocks in one piece.
#include <algorithm>
#include <array>
#include <vector>

#include "backend/cpu_attention.h"
#include "backend/cpu_backend.h"
#include "backend/cpu_kv_cache.h"
#include "base/aligned_buffer.h"
#include "base/error.h"

namespace coreinfer {

struct AttendScratch {
  std::array<RopeTable, 4> rope;  // layers differ in a few tables at most
  size_t oldest_rope = 0;
  AlignedBuffer queries;       // (n_head_kv, rows, group, head_dim): rotated and scaled
  AlignedBuffer bf16_queries;  // (2, …) the same as high and low, where there are tiles
  AlignedBuffer partials;      // Sums of (kv head, span), or of one span a thread
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
  t.fill();
  return t;
}

namespace {

constexpr int64_t kSpanBlocks = 4;
constexpr int64_t kSpan = kSpanBlocks * kKvBlock;
// Queries that run over the blocks together in a large batch; their results stay in the
// second-level cache.
constexpr int64_t kBatchQueries = 128;
// From so many heads a thread on, heads are pieces of work.
constexpr int64_t kHeadsPerThread = 4;
// Floats of span results that wait for being merged (16 MiB).
constexpr int64_t kPartialFloats = int64_t{1} << 22;

size_t bytes_of(int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); }

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

// Every row into the cache, those of one block of positions at a time: keys of a block share cache
// lines.
void prepare_rows(const Attention& a, ThreadPool::Context& context) {
  const int64_t first_block = a.first / kKvBlock;
  const int64_t blocks = (a.first + a.n() - 1) / kKvBlock + 1 - first_block;
  int64_t at, end;
  while (context.next(a.spec.n_head_kv * blocks, 1, &at, &end)) {
    const int64_t start = (first_block + at % blocks) * kKvBlock - a.first;
    a.prepare(at / blocks, std::max<int64_t>(0, start), std::min(a.n(), start + kKvBlock));
  }
}

// Groups of rows, each over all that it sees. Sums have room for `room` queries.
void attend_batch(const Attention& a, int64_t rows_together, int64_t room, const Panel& panel,
                  ThreadPool::Context& context) {
  const int64_t groups = (a.n() + rows_together - 1) / rows_together;
  const Sums sums = Sums::at(panel.sums.as<float>(), room, a.head_dim());
  int64_t at, end;
  while (context.next(a.spec.n_head_kv * groups, 1, &at, &end)) {
    // The last rows see most: they go first.
    const int64_t head = at % a.spec.n_head_kv;
    const int64_t row = (groups - 1 - at / a.spec.n_head_kv) * rows_together;
    const int64_t count = std::min(rows_together, a.n() - row);
    const int64_t last = a.first + row + count - 1;
    sums.clear(room, a.head_dim());
    a.pass(head, row, count, first_seen(a.spec, a.first + row) / kKvBlock, last / kKvBlock + 1,
           panel, sums);
    a.finish(head, row, count, sums);
  }
}

// All rows, span by span.
struct SpanPlan {
  int64_t begin;  // spans that some row sees: [begin, end)
  int64_t end;
  bool by_head;         // heads are the pieces of work, not spans
  int64_t wave;         // spans computed before their results are merged
  int64_t part_floats;  // of one span and kv head

  SpanPlan(const AttentionSpec& spec, int64_t first, int64_t n, int n_threads) {
    begin = first_seen(spec, first) / kSpan;
    end = (first + n - 1) / kSpan + 1;
    by_head = end - begin == 1 || spec.n_head_kv >= kHeadsPerThread * n_threads;
    part_floats = Sums::floats(n * spec.n_head / spec.n_head_kv, spec.head_dim);
    wave = std::clamp<int64_t>(kPartialFloats / (spec.n_head_kv * part_floats), 1, end - begin);
  }
  int64_t partials(const AttentionSpec& spec, int n_threads) const {
    return by_head ? n_threads : wave * spec.n_head_kv;
  }
};

// part := what all rows see of a head's span.
void pass_span(const Attention& a, int64_t head, int64_t span, const Panel& panel, Sums part) {
  part.clear(a.n() * a.group(), a.head_dim());
  const int64_t end = std::min((span + 1) * kSpanBlocks, a.end_block());
  a.pass(head, 0, a.n(), span * kSpanBlocks, end, panel, part);
}

// A head in one piece, from its rows to its results.
void attend_heads(const Attention& a, const SpanPlan& plan, float* partials, float* totals,
                  const Panel& panel, ThreadPool::Context& context) {
  const int64_t queries = a.n() * a.group(), d = a.head_dim();
  const Sums part = Sums::at(partials + context.thread() * plan.part_floats, queries, d);
  int64_t head, end;
  // Heads in a row, since each fetches the beginning of the next one ahead.
  while (context.next_share(a.spec.n_head_kv, 1, &head, &end)) {
    for (; head < end; ++head) {
      const Sums total = Sums::at(totals + head * plan.part_floats, queries, d);
      total.clear(queries, d);
      a.prepare(head, 0, a.n());
      for (int64_t span = plan.begin; span < plan.end; ++span) {
        pass_span(a, head, span, panel, part);
        total.merge(a.vector, part, queries, d);
      }
      a.finish(head, 0, a.n(), total);
    }
  }
}

// A span of a head in one piece, in waves whose results fit the partial sums.
void attend_spans(const Attention& a, const SpanPlan& plan, float* partials, float* totals,
                  const Panel& panel, ThreadPool::Context& context) {
  const int64_t heads = a.spec.n_head_kv, queries = a.n() * a.group(), d = a.head_dim();
  const auto sums_in = [&](float* memory, int64_t i) {
    return Sums::at(memory + i * plan.part_floats, queries, d);
  };
  int64_t at, end;
  for (int64_t from = plan.begin; from < plan.end; from += plan.wave) {
    const int64_t spans = std::min(plan.wave, plan.end - from);
    // Several spans of a head in a row, since each fetches the beginning of the next one ahead.
    const int64_t chunk = std::max<int64_t>(1, spans * heads / (4 * context.n_threads()));
    while (context.next(spans * heads, chunk, &at, &end)) {
      for (; at < end; ++at) {
        const int64_t head = at / spans, span = from + at % spans;
        pass_span(a, head, span, panel, sums_in(partials, at));
      }
    }
    context.barrier();
    while (context.next(heads, 1, &at, &end)) {
      const Sums total = sums_in(totals, at);
      if (from == plan.begin) total.clear(queries, d);
      for (int64_t i = 0; i < spans; ++i) {
        total.merge(a.vector, sums_in(partials, at * spans + i), queries, d);
      }
      if (from + spans == plan.end) a.finish(at, 0, a.n(), total);
    }
    if (from + spans < plan.end) context.barrier();
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

  const int64_t d = spec.head_dim;
  const int64_t group = spec.n_head / spec.n_head_kv;
  const bool exact = q.n <= kExactRows;
  // Matrix tiles for large batches, unless every activation is to stay float32.
  const AttentionKernels& kernels = attention_kernels(isa_);
  const bool tiled = !exact && !options_.f32_activations && d % TileKernels::kMultiple == 0;
  const TileKernels* tiles = tiled ? kernels.tiles : nullptr;
  const int64_t past = tiles ? TileKernels::kRows : 0;  // room to read and write whole tiles
  const int64_t rows_together = exact ? q.n : std::max<int64_t>(1, kBatchQueries / group);
  const int64_t room = rows_together * group + past;  // queries of a piece of work

  const int64_t all_queries = (q.n * spec.n_head + past) * d;
  s.queries.ensure(bytes_of(all_queries));
  if (tiles) s.bf16_queries.ensure(bytes_of(all_queries));
  s.panels.resize(static_cast<size_t>(pool_.n_threads()));
  for (Panel& panel : s.panels) {
    panel.keys.ensure(bytes_of(d * kKvBlock));
    panel.values.ensure(bytes_of(d * kKvBlock));
    panel.scores.ensure(bytes_of(room * kKvBlock));
    if (!exact) panel.sums.ensure(bytes_of(Sums::floats(room, d)));
    if (!tiles) continue;
    panel.key_pairs.ensure(bytes_of(d * kKvBlock));
    panel.value_pairs.ensure(bytes_of(d * kKvBlock));
    panel.weights.ensure(bytes_of(room * kKvBlock));
  }
  const SpanPlan plan(spec, first, q.n, pool_.n_threads());
  if (exact) {
    s.partials.ensure(bytes_of(plan.partials(spec, pool_.n_threads()) * plan.part_floats));
    s.totals.ensure(bytes_of(spec.n_head_kv * plan.part_floats));
  }
  const RopeTable* rope = spec.rope == RopeKind::kNone ? nullptr : &s.rope_table(spec, first, q.n);
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
                            .high_queries = s.bf16_queries.as<uint16_t>(),
                            .low_queries = s.bf16_queries.as<uint16_t>() + all_queries};

  auto* const partials = s.partials.as<float>();
  auto* const totals = s.totals.as<float>();
  const auto panel_of = [&s](const ThreadPool::Context& context) -> const Panel& {
    return s.panels[static_cast<size_t>(context.thread())];
  };
  if (exact && plan.by_head) {
    pool_.share([&](ThreadPool::Context& context) {
      attend_heads(attention, plan, partials, totals, panel_of(context), context);
    });
  } else {
    pool_.run([&](ThreadPool::Context& context) {
      prepare_rows(attention, context);
      context.barrier();
      if (exact) {
        attend_spans(attention, plan, partials, totals, panel_of(context), context);
      } else {
        attend_batch(attention, rows_together, room, panel_of(context), context);
      }
    });
  }
  kv.mark_written(layer, first + q.n);
}

}  // namespace coreinfer
