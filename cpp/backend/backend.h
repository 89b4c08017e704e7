// What a device must be able to do for one transformer layer: about a dozen coarse operations over
// rows of float32 and packed weights. forward/ tells the story with them; cpu_backend and the CUDA
// library carry it out. A backend knows no architecture, no token text and no file.
//
// Numerics that every backend keeps: for 1 to 16 rows in a call, a row's bits do not depend on the
// number of rows, on threads or on chunking. Larger batches may round differently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tensor/mat.h"

namespace coreinfer {

// At most this many rows take the path whose bits are independent of the batch.
inline constexpr int64_t kExactRows = 16;

// Rows of float32 in backend memory; not an owner.
struct Rows {
  float* data = nullptr;
  int64_t n = 0;       // rows (tokens)
  int64_t width = 0;   // elements used in a row
  int64_t stride = 0;  // elements from one row to the next

  Rows slice(int64_t begin, int64_t count) const {
    return {data + begin * stride, count, width, stride};
  }
};

// Float32 memory owned by a backend (host memory on the CPU, device memory on a GPU).
class Buffer {
 public:
  virtual ~Buffer() = default;
  float* data() const { return data_; }
  int64_t size() const { return size_; }
  Rows rows(int64_t n, int64_t width) const { return {data_, n, width, width}; }

 protected:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
using BufferPtr = std::shared_ptr<Buffer>;

// A weight matrix in the layout that the backend computes with; immutable once made.
class Weight {
 public:
  virtual ~Weight() = default;
  DType type() const { return type_; }
  int64_t rows() const { return rows_; }  // outputs
  int64_t cols() const { return cols_; }  // inputs (picked columns for a compacted matrix)
  // Bytes that one pass over the matrix reads, zeros among its inputs left aside.
  size_t bytes() const { return bytes_; }

 protected:
  DType type_ = DType::kF32;
  int64_t rows_ = 0;
  int64_t cols_ = 0;
  size_t bytes_ = 0;
};
using WeightPtr = std::shared_ptr<const Weight>;

enum class NormKind { kRms, kLayer };

// Normalisation of a row before it is used. weight == nullptr: no normalisation.
struct Norm {
  NormKind kind = NormKind::kRms;
  BufferPtr weight;  // (width)
  BufferPtr bias;    // (width), LayerNorm only, may be null
  float eps = 1e-5f;
};

// act(gate) * up with a gate, act(up) without.
struct Activation {
  enum Kind { kSilu, kGeluTanh, kRelu };
  Kind kind = kSilu;
  float threshold = 0.0f;  // of kRelu: x where it is above, else 0
  bool both = false;       // act(gate) * act(up); with kRelu and a gate only

  bool operator==(const Activation&) const = default;
};

// y = W x + bias; added to `out` instead of stored when `accumulate`.
struct Linear {
  const Weight* weight = nullptr;
  const Buffer* bias = nullptr;  // (rows) or null
  Rows out;
  bool accumulate = false;
  bool f32 = false;  // no rounding of activations, in large batches either
};

// One feed-forward network, dense or compacted: decode does not know which.
struct FfnWeights {
  WeightPtr gate;       // (n_ff, n_embd); null where the architecture has no gate
  WeightPtr up;         // (n_ff, n_embd)
  WeightPtr down;       // (n_embd, n_ff)
  BufferPtr gate_bias;  // (n_ff) or null
  BufferPtr up_bias;    // (n_ff) or null
  BufferPtr down_bias;  // (n_embd) or null
  // A low-rank part that answers for neurons that are not here: y += patch_out (patch_in h), h the
  // input of `down`. Both, or both null.
  WeightPtr patch_in;   // (rank, n_ff)
  WeightPtr patch_out;  // (n_embd, rank)

  int64_t n_ff() const { return up ? up->rows() : 0; }
  size_t patch_bytes() const { return patch_in ? patch_in->bytes() + patch_out->bytes() : 0; }
  size_t bytes() const {
    return (gate ? gate->bytes() : 0) + (up ? up->bytes() : 0) + (down ? down->bytes() : 0) +
           patch_bytes();
  }
};

enum class RopeKind { kNone, kInterleaved, kHalves };  // GGUF's NORM and NEOX orders

struct AttentionSpec {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  float scale = 1.0f;    // q.k is multiplied by this
  float softcap = 0.0f;  // 0: none; else softcap * tanh(score / softcap)
  int64_t window = 0;    // 0: all earlier positions; else the last `window`, own included
  Norm q_norm;           // per head, (head_dim); before rope
  Norm k_norm;
  RopeKind rope = RopeKind::kNone;
  int64_t rope_dim = 0;  // rotated elements at the head's start, even
  // Angle of pair i at position p is p * rope_freq[i] (float32, (rope_dim / 2), host memory,
  // scaling already applied); cos and sin are multiplied by rope_scale.
  std::shared_ptr<const std::vector<float>> rope_freq;
  float rope_scale = 1.0f;
};

enum class KvType { kF16, kF32, kQ8_0 };

struct KvSpec {
  KvType type_k = KvType::kF16;
  KvType type_v = KvType::kF16;
  int64_t n_layer = 0;
  int64_t n_ctx = 0;
  int64_t row_width = 0;  // n_head_kv * head_dim
  int64_t head_dim = 0;
};

// Keys and values of every layer. Address space is reserved for n_ctx positions; memory is
// committed as positions are written.
class KvCache {
 public:
  virtual ~KvCache() = default;
  const KvSpec& spec() const { return spec_; }
  virtual size_t committed_bytes() const = 0;
  // Of one position's keys and values in one layer, without padding.
  virtual size_t position_bytes() const = 0;
  // Copies positions [0, n) of every layer out of and into the cache, in the cache's own types.
  virtual std::vector<std::byte> save(int64_t n) const = 0;
  virtual void restore(std::span<const std::byte> bytes, int64_t n) = 0;

 protected:
  KvSpec spec_;
};
using KvCachePtr = std::unique_ptr<KvCache>;

// How a token's activations become neuron scores; DESIGN of the statistics: neurons/statistic.h.
enum class Statistic { kCount, kCountGate, kCountAbs, kFlock };

// Where the sums over the first `row` rows of a call go too, row >= 1; marks ascend.
struct ScoreMark {
  int64_t row = 0;
  float* scores = nullptr;  // (h.width)
};
// Marks of one call at most; a power of two each.
inline constexpr size_t kMaxScoreMarks = 32;

// In place of the number of a row with NaN or Inf: there was none. Row numbers stay below 2^24.
inline constexpr float kNoBadRow = 1e9f;

// What compaction reads for one layer: matrices in the model file, never the repacked copies.
struct CompactSource {
  Mat gate;  // (n_ff, n_embd); empty where there is no gate
  Mat up;    // (n_ff, n_embd)
  Mat down;  // (n_embd, n_ff)
  BufferPtr gate_bias;
  BufferPtr up_bias;
  BufferPtr down_bias;
  bool zeros = false;                // most inputs of `down` are zero: load_for_zeros
  std::span<const int32_t> neurons;  // ascending, within [0, n_ff)
  std::function<void()> finished;    // called, if given, once the matrices have been read
};

// Memory that compaction takes piece by piece, so that layers that are gathered one at a time lie
// in one contiguous buffer too.
struct Room {
  BufferPtr buffer;
  size_t used = 0;  // bytes

  size_t left() const { return static_cast<size_t>(buffer->size()) * sizeof(float) - used; }
};

// The core-neuron weights of all layers, in one contiguous buffer.
struct CompactWeights {
  std::vector<FfnWeights> layers;
  size_t buffer_bytes = 0;  // the contiguous buffer
  size_t source_bytes = 0;  // bytes of the model file that were read to make it
};

struct BackendInfo {
  std::string name;  // "CPU", "CUDA"
  std::string isa;   // "avx512", "sm_90"
  int n_threads = 0;
  std::string description;  // one line for people
  // Bytes of the device's own memory for weights, caches and the work of sessions; 0: host memory.
  uint64_t device_memory = 0;
  uint64_t device_own = 0;  // bytes of it that the backend works with itself, beside those
  // load() comes back while the copy is under way, beside what was issued before.
  bool loads_ahead = false;
  std::string device = {};   // the GPU's name; "" for the CPU
  uint64_t device_peak = 0;  // bytes of its memory that were taken at one time, at most
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual BackendInfo info() const = 0;

  // ---- memory
  virtual BufferPtr allocate(int64_t n_floats) = 0;
  virtual void read(const float* from, float* to_host, int64_t n) = 0;
  virtual void write(const float* from_host, float* to, int64_t n) = 0;
  virtual void copy(Rows from, Rows to) = 0;          // of one shape; both in backend memory
  virtual BufferPtr load_vector(const Mat& mat) = 0;  // float32 copy of a (1, n) tensor
  // Bytes of memory that such a matrix takes once it is loaded.
  virtual uint64_t loaded_bytes(DType type, int64_t rows, int64_t cols) const {
    return static_cast<uint64_t>(rows) * row_bytes(type, cols);
  }
  // Copies a matrix into the layout for computing; the Mat's memory is not needed any more.
  virtual WeightPtr load(const Mat& mat) = 0;
  // The same for a matrix whose inputs are mostly zeros (what ReLU gives): columns that meet a zero
  // need not be read.
  virtual WeightPtr load_for_zeros(const Mat& mat) { return load(mat); }
  virtual KvCachePtr make_kv_cache(const KvSpec& spec) = 0;

  // ---- one layer
  // out[i] = scale * table[tokens[i]] (+ positions[first_position + i], where given).
  virtual void embed(std::span<const int32_t> tokens, const Mat& table, float scale,
                     const Mat& positions, int64_t first_position, Rows out) = 0;
  // out = norm(x); in place allowed.
  virtual void norm(Rows x, const Norm& norm, Rows out) = 0;
  // Every output of `linears` from one shared, normalised input.
  virtual void linear(Rows x, const Norm& norm, std::span<const Linear> linears) = 0;
  // h = act(G x') * (U x') with a gate, act(U x') without; x' = norm(x), and each product has its
  // bias added. Where act_gate.data is given it receives act(G x') too (count_gate; without a gate
  // the same as h). What lies between the rows of h may be overwritten.
  virtual void ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act,
                          Rows h, Rows act_gate) = 0;
  // Head norms and rope on q and k, k and v stored at positions [first, first + n), then each row's
  // attention over all positions up to its own. q, k and v are overwritten.
  virtual void attend(const AttentionSpec& spec, Rows q, Rows k, Rows v, KvCache& cache,
                      int64_t layer, int64_t first, Rows out) = 0;
  // x += norm(y) (norm.weight null: x += y). The operation after it may want x normalised by
  // `next`: a backend may prepare for that.
  virtual void add(Rows x, Rows y, const Norm& norm, const Norm& next) = 0;

  // ---- neurons
  // Adds each row's score vector to scores (h.width floats). Rows are added in order, so the sum
  // does not depend on chunking; on the way they are copied to the marks. Row r with a NaN or Inf
  // lowers *bad, which is kNoBadRow before, to first_row + r; nothing is added or copied then.
  // Nobody waits for a device here: who wants to know reads *bad, once for many calls.
  virtual void accumulate(Statistic statistic, double alpha, Rows h, float* scores,
                          std::span<const ScoreMark> marks, int64_t first_row, float* bad) = 0;
  // Of each row of scores: the k entries of highest positive score, ties to the lower index,
  // ascending; fewer when fewer are positive.
  virtual std::vector<std::vector<int32_t>> select(Rows scores, int64_t k) = 0;
  // Copies the picked neurons of the layers into one contiguous buffer, values exactly kept: into
  // `room`, where one is given that suffices, else into memory of their own.
  virtual CompactWeights compact(std::span<const CompactSource> layers, Room* room) = 0;
};

struct CpuOptions {
  int n_threads = 0;             // 0: ThreadPool::default_threads()
  bool f32_activations = false;  // no 8-bit or bf16 rounding of activations anywhere
  bool memory_limited = false;   // memory is given back that might be used again later
};
std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

}  // namespace coreinfer
