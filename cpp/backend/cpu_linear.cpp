// Matrix products of the CPU backend: load, embed, linear, ffn_hidden. The tokens are brought into
// the forms that the weights ask for (normalised; as 8-bit codes), once for all weights of a call;
// then threads claim strips of 16 outputs and compute them for all tokens.
#include <algorithm>
#include <array>
#include <functional>

#include "backend/cpu_backend.h"
#include "backend/cpu_weight.h"
#include "base/aligned_buffer.h"
#include "base/error.h"
#include "kernels/dequantize.h"
#include "kernels/linear.h"
#include "kernels/packed_pack.h"
#include "kernels/vector.h"

namespace coreinfer {
namespace {

// Tokens that are computed together: their activations stay in the second-level cache while the
// strips of a chunk pass over them.
constexpr int64_t kTokenBlock = 128;
// Columns of a float panel: 32 KiB, about a first-level cache.
constexpr int64_t kPanelCols = 512;
// Forms that the tokens of one call may take, and weights of one call.
constexpr size_t kMaxInputs = 4;
constexpr size_t kMaxOutputs = 8;

constexpr size_t round_up(size_t n) { return (n + kCacheLine - 1) / kCacheLine * kCacheLine; }

const CpuWeight& cpu_weight(const Weight* weight) {
  if (weight == nullptr) throw_error(ErrorKind::kState, "a matrix product without a weight");
  return static_cast<const CpuWeight&>(*weight);
}

// The tokens in one form.
struct Input {
  const ColumnGroups* columns = nullptr;  // null: plain rows
  bool quantized = false;
  QuantizedRows codes;      // when quantized
  FloatRows values;         // when not; in packed order when columns are not dense
  float* packed = nullptr;  // memory of `values` where they are rearranged

  bool serves(const CpuWeight& w, bool quantize) const {
    const ColumnGroups* const c = w.columns().get();
    if (quantized != (quantize && c != nullptr)) return false;
    if (columns == c) return true;
    const bool in_order = (columns == nullptr || columns->dense) && (c == nullptr || c->dense);
    if (!quantized) return in_order;
    return in_order && columns->group_size == c->group_size;
  }
};

struct Output {
  const CpuWeight* weight = nullptr;
  size_t input = 0;
};

// Memory of one call, cut up anew for each.
class Arena {
 public:
  void reset(AlignedBuffer* memory) {
    memory_ = memory->as<std::byte>();
    used_ = 0;
  }
  template <class T>
  T* take(size_t n) {
    T* const p = reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(n * sizeof(T));
    return p;
  }

 private:
  std::byte* memory_ = nullptr;
  size_t used_ = 0;
};

}  // namespace

struct LinearScratch {
  AlignedBuffer inputs;
  AlignedBuffer threads;
};

namespace {

// One call of linear or ffn_hidden: what is computed from what.
class Product {
 public:
  Product(Isa isa, bool f32, ThreadPool& pool, std::shared_ptr<LinearScratch>& scratch, Rows x,
          const Norm& norm)
      : kernels_(linear_kernels(isa)),
        vectors_(vector_kernels(isa)),
        f32_(f32),
        pool_(pool),
        x_(x),
        norm_(norm) {
    if (!scratch) scratch = std::make_shared<LinearScratch>();
    scratch_ = scratch.get();
  }

  // Registers a weight; returns its number.
  size_t add(const Weight* weight) {
    const CpuWeight& w = cpu_weight(weight);
    if (w.cols() != x_.width) {
      throw_error(ErrorKind::kState, "a matrix of %lld columns times rows of %lld elements",
                  static_cast<long long>(w.cols()), static_cast<long long>(x_.width));
    }
    size_t i = 0;
    while (i < n_inputs_ && !inputs_[i].serves(w, !f32_)) ++i;
    if (i == n_inputs_) {
      if (n_inputs_ == kMaxInputs) throw_error(ErrorKind::kState, "too many kinds of weights");
      Input& in = inputs_[n_inputs_++];
      in.columns = w.columns().get();
      in.quantized = w.packed() && !f32_;
    }
    if (n_outputs_ == kMaxOutputs) throw_error(ErrorKind::kState, "too many weights in one call");
    outputs_[n_outputs_] = {&w, i};
    return n_outputs_++;
  }

  // Calls finish(thread's tiles, number, first token, n tokens) for number in [0, n_tiles) and all
  // tokens; there tile(…) computes. n_buffers tiles of kTokenBlock tokens belong to each thread.
  template <class Finish>
  void run(int64_t n_tiles, int n_buffers, const Finish& finish) {
    reserve(n_buffers);
    struct Job {
      Product* product;
      int64_t n_tiles;
      size_t thread_bytes;
      const Finish* finish;
    } const job{this, n_tiles, thread_bytes(n_buffers), &finish};
    // One pointer fits into a std::function without an allocation.
    pool_.run([j = &job](ThreadPool::Context& context) {
      Product& p = *j->product;
      int64_t begin, end;
      while (context.next(p.x_.n, 1, &begin, &end)) p.prepare(begin);
      context.barrier();
      std::byte* const memory = p.scratch_->threads.template as<std::byte>() +
                                j->thread_bytes * static_cast<size_t>(context.thread());
      float* const panel = reinterpret_cast<float*>(memory);
      float* const tiles = panel + kPanelCols * kStripRows;
      const int64_t chunk =
          std::clamp<int64_t>(j->n_tiles / (8 * context.n_threads()), 1, kChunkTiles);
      while (context.next(j->n_tiles, chunk, &begin, &end)) {
        for (int64_t t = 0; t < p.x_.n; t += kTokenBlock) {
          const int64_t n = std::min(kTokenBlock, p.x_.n - t);
          for (int64_t i = begin; i < end; ++i) (*j->finish)(panel, tiles, i, t, n);
        }
      }
    });
  }

  // tile[t * 16 + r] = output 16 * strip + r of a weight for token first + t.
  void tile(size_t output, int64_t strip, int64_t first, int64_t n, float* panel,
            float* tile) const {
    const CpuWeight& w = *outputs_[output].weight;
    const Input& in = inputs_[outputs_[output].input];
    if (in.quantized) {
      const DotStripFn dot = kernels_.dot_strip(w.type(), w.columns()->dense);
      return dot(w.strips(), strip, in.codes.from(first), n, tile);
    }
    const FloatRows x{in.values.data + first * in.values.stride, in.values.stride};
    if (w.packed()) return packed_tile(w, strip, x, n, panel, tile);
    plain_tile(w, strip, x, n, panel, tile);
  }

  const VectorKernels& vectors() const { return vectors_; }
  const CpuWeight& weight(size_t output) const { return *outputs_[output].weight; }

 private:
  static constexpr int64_t kChunkTiles = 8;

  static size_t thread_bytes(int n_buffers) {
    return static_cast<size_t>((kPanelCols + n_buffers * kTokenBlock) * kStripRows) * sizeof(float);
  }

  bool has_norm() const { return norm_.weight != nullptr; }

  // Grows the scratch and hands it out.
  void reserve(int n_buffers) {
    const auto n = static_cast<size_t>(x_.n);
    const size_t width = round_up(static_cast<size_t>(x_.width) * sizeof(float));
    size_t bytes = has_norm() ? n * width : 0;
    for (size_t i = 0; i < n_inputs_; ++i) {
      const Input& in = inputs_[i];
      if (in.quantized) {
        bytes += n * (round_up(static_cast<size_t>(in.columns->padded_cols)) +
                      3 * round_up(in.columns->groups.size() * 4));
        bytes += 4 * kCacheLine;
      } else if (in.columns != nullptr && !in.columns->dense) {
        bytes += n * width;
      }
    }
    scratch_->inputs.ensure(bytes);
    scratch_->threads.ensure(thread_bytes(n_buffers) * static_cast<size_t>(pool_.n_threads()));

    Arena arena;
    arena.reset(&scratch_->inputs);
    const auto stride = static_cast<int64_t>(width / sizeof(float));
    FloatRows plain{x_.data, x_.stride};
    if (has_norm()) {
      normed_ = arena.take<float>(n * static_cast<size_t>(stride));
      plain = {normed_, stride};
    }
    for (size_t i = 0; i < n_inputs_; ++i) {
      Input& in = inputs_[i];
      if (in.quantized) {
        const size_t codes = round_up(static_cast<size_t>(in.columns->padded_cols));
        const size_t groups = round_up(in.columns->groups.size() * 4) / 4;
        in.codes = {arena.take<int8_t>(n * codes),   arena.take<float>(n * groups),
                    arena.take<int32_t>(n * groups), arena.take<float>(n * groups),
                    static_cast<int64_t>(codes),     static_cast<int64_t>(groups)};
      } else if (in.columns != nullptr && !in.columns->dense) {
        in.packed = arena.take<float>(n * static_cast<size_t>(stride));
        in.values = {in.packed, stride};
      } else {
        in.values = plain;
      }
    }
  }

  // Token t in every form.
  void prepare(int64_t t) {
    const float* row = x_.data + t * x_.stride;
    if (has_norm()) {
      const auto stride =
          static_cast<int64_t>(round_up(static_cast<size_t>(x_.width) * sizeof(float)) / 4);
      float* const out = normed_ + t * stride;
      const float* const weight = norm_.weight->data();
      if (norm_.kind == NormKind::kRms) {
        vectors_.rms_norm(row, weight, norm_.eps, x_.width, out);
      } else {
        const float* const bias = norm_.bias ? norm_.bias->data() : nullptr;
        vectors_.layer_norm(row, weight, bias, norm_.eps, x_.width, out);
      }
      row = out;
    }
    for (size_t i = 0; i < n_inputs_; ++i) {
      const Input& in = inputs_[i];
      if (in.quantized) {
        kernels_.quantize(*in.columns, row, in.codes.from(t));
      } else if (in.packed != nullptr) {
        float* const out = in.packed + t * in.values.stride;
        for (const ColumnGroup& g : in.columns->groups) {
          std::copy_n(row + g.first, g.n, out + g.before);
        }
      }
    }
  }

  void packed_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n, float* panel,
                   float* tile) const {
    const UnpackPanelFn unpack = kernels_.unpack_panel(w.type());
    const auto& groups = w.columns()->groups;
    const auto n_groups = static_cast<int64_t>(groups.size());
    const int64_t step = kPanelCols / w.columns()->group_size;
    std::fill_n(tile, n * kStripRows, 0.0f);
    for (int64_t g = 0; g < n_groups; g += step) {
      const int64_t end = std::min(g + step, n_groups);
      const int64_t first = groups[static_cast<size_t>(g)].before;
      const int64_t last =
          groups[static_cast<size_t>(end - 1)].before + groups[static_cast<size_t>(end - 1)].n;
      unpack(w.strips(), strip, g, end, panel);
      kernels_.dot_panel(panel, last - first, {x.data + first, x.stride}, n, tile);
    }
  }

  void plain_tile(const CpuWeight& w, int64_t strip, const FloatRows& x, int64_t n, float* panel,
                  float* tile) const {
    const Mat& mat = w.plain();
    const int64_t row = strip * kStripRows;
    const int64_t rows = std::min<int64_t>(kStripRows, mat.rows - row);
    if (x_.n <= kExactRows) {
      const DotRowFn dot = kernels_.dot_row(mat.type);
      for (int64_t r = 0; r < rows; ++r) dot(mat.row(row + r), mat.cols, x, n, tile + r);
      return;
    }
    std::fill_n(tile, n * kStripRows, 0.0f);
    for (int64_t c = 0; c < mat.cols; c += kPanelCols) {
      const int64_t end = std::min(c + kPanelCols, mat.cols);
      kernels_.transpose_panel(mat.type, mat.row(row), mat.stride(), rows, c, end, panel);
      kernels_.dot_panel(panel, end - c, {x.data + c, x.stride}, n, tile);
    }
  }

  const LinearKernels& kernels_;
  const VectorKernels& vectors_;
  bool f32_;
  ThreadPool& pool_;
  LinearScratch* scratch_ = nullptr;
  Rows x_;
  const Norm& norm_;
  float* normed_ = nullptr;
  std::array<Input, kMaxInputs> inputs_;
  std::array<Output, kMaxOutputs> outputs_;
  size_t n_inputs_ = 0;
  size_t n_outputs_ = 0;
};

int64_t strips_of(const Weight& w) { return (w.rows() + kStripRows - 1) / kStripRows; }

void add_bias(const Buffer* bias, int64_t row, int64_t rows, int64_t n, float* tile) {
  if (bias == nullptr) return;
  const float* const b = bias->data() + row;
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t r = 0; r < rows; ++r) tile[t * kStripRows + r] += b[r];
  }
}

}  // namespace

WeightPtr CpuBackend::load(const Mat& mat) {
  if (!traits(mat.type).quantized) return std::make_shared<CpuWeight>(mat, nullptr);
  ColumnGroupsPtr columns = all_columns(mat.type, mat.cols);
  PackedView strips = packed_layout(mat.type, mat.rows, *columns);
  auto memory = std::make_shared<AlignedBuffer>(strips.bytes() + kPackedSlack);
  strips.data = memory->as<std::byte>();
  pool_.run([&](ThreadPool::Context& context) {
    int64_t begin, end;
    while (context.next(strips.n_strips(), 4, &begin, &end)) {
      pack_strips(mat, {}, strips, begin, end);
    }
  });
  return std::make_shared<CpuWeight>(strips, std::move(columns), std::move(memory));
}

void CpuBackend::embed(std::span<const int32_t> tokens, const Mat& table, float scale,
                       const Mat& positions, int64_t first_position, Rows out) {
  const auto n = static_cast<int64_t>(tokens.size());
  for (int32_t token : tokens) {
    if (token < 0 || token >= table.rows) {
      throw_error(ErrorKind::kValue, "token id %d, expected 0 to %lld", token,
                  static_cast<long long>(table.rows - 1));
    }
  }
  if (!positions.empty() && (first_position < 0 || first_position + n > positions.rows)) {
    throw_error(ErrorKind::kValue, "positions %lld to %lld, but the model has embeddings for %lld",
                static_cast<long long>(first_position),
                static_cast<long long>(first_position + n - 1),
                static_cast<long long>(positions.rows));
  }
  const std::lock_guard lock(mutex_);
  const VectorKernels& vectors = vector_kernels(isa_);
  float* position = nullptr;
  if (!positions.empty()) {
    if (!linear_scratch_) linear_scratch_ = std::make_shared<LinearScratch>();
    linear_scratch_->inputs.ensure(static_cast<size_t>(positions.cols) * sizeof(float));
    position = linear_scratch_->inputs.as<float>();
  }
  for (int64_t i = 0; i < n; ++i) {
    float* const row = out.data + i * out.stride;
    dequantize_row(table.type, table.row(tokens[static_cast<size_t>(i)]), row, table.cols);
    if (scale != 1.0f) vectors.scale(row, scale, table.cols);
    if (positions.empty()) continue;
    dequantize_row(positions.type, positions.row(first_position + i), position, positions.cols);
    vectors.add(row, position, table.cols);
  }
}

void CpuBackend::linear(Rows x, const Norm& norm, std::span<const Linear> linears) {
  const std::lock_guard lock(mutex_);
  if (x.n == 0) return;
  Product product(isa_, options_.f32_activations, pool_, linear_scratch_, x, norm);
  std::array<int64_t, kMaxOutputs + 1> first{};
  for (size_t i = 0; i < linears.size(); ++i) {
    product.add(linears[i].weight);
    first[i + 1] = first[i] + strips_of(*linears[i].weight);
  }
  product.run(first[linears.size()], 1,
              [&](float* panel, float* tile, int64_t number, int64_t token, int64_t n) {
                size_t i = 0;
                while (number >= first[i + 1]) ++i;
                const Linear& l = linears[i];
                const int64_t strip = number - first[i], row = strip * kStripRows;
                const int64_t rows = std::min<int64_t>(kStripRows, l.weight->rows() - row);
                product.tile(i, strip, token, n, panel, tile);
                add_bias(l.bias, row, rows, n, tile);
                for (int64_t t = 0; t < n; ++t) {
                  float* const y = l.out.data + (token + t) * l.out.stride + row;
                  const float* const from = tile + t * kStripRows;
                  for (int64_t r = 0; r < rows; ++r) y[r] = l.accumulate ? y[r] + from[r] : from[r];
                }
              });
}

void CpuBackend::ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, Activation act, Rows h,
                            Rows act_gate) {
  const std::lock_guard lock(mutex_);
  if (x.n == 0) return;
  Product product(isa_, options_.f32_activations, pool_, linear_scratch_, x, norm);
  const size_t up = product.add(ffn.up.get());
  const bool gated = ffn.gate != nullptr;
  const size_t gate = gated ? product.add(ffn.gate.get()) : up;
  const VectorKernels& vectors = product.vectors();
  const ActivateFn activate = act == Activation::kSilu       ? vectors.silu
                              : act == Activation::kGeluTanh ? vectors.gelu_tanh
                                                             : vectors.relu;
  product.run(strips_of(*ffn.up), 2,
              [&](float* panel, float* tiles, int64_t strip, int64_t token, int64_t n) {
                const int64_t row = strip * kStripRows;
                const int64_t rows = std::min<int64_t>(kStripRows, ffn.n_ff() - row);
                float* const up_tile = tiles;
                float* const gate_tile = gated ? tiles + kTokenBlock * kStripRows : up_tile;
                product.tile(up, strip, token, n, panel, up_tile);
                add_bias(ffn.up_bias.get(), row, rows, n, up_tile);
                if (gated) product.tile(gate, strip, token, n, panel, gate_tile);
                for (int64_t t = 0; t < n; ++t) {
                  float* const a =
                      act_gate.data ? act_gate.data + (token + t) * act_gate.stride + row : nullptr;
                  activate(gate_tile + t * kStripRows, gated ? up_tile + t * kStripRows : nullptr,
                           rows, h.data + (token + t) * h.stride + row, a);
                }
              });
}

}  // namespace coreinfer
