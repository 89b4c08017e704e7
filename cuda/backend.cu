// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "attention.h"
#include "backend.h"
#include "kv_cache.h"
#include "neurons.h"

namespace coreinfer::cuda {
namespace {

class CudaBuffer final : public Buffer {
 public:
  CudaBuffer(const ContextPtr& context, int64_t n)
      : memory_(context, static_cast<size_t>(n) * sizeof(float), "buffer") {
    data_ = memory_.as<float>();
    size_ = n;
  }

 private:
  Memory memory_;
};

// Positions, scalars, rows of embeddings, and what pages round up of a session's buffers.
constexpr size_t kSmallThings = size_t{32} << 20;
// What the driver takes for a step's graph and for some of other lengths (context.h).
constexpr size_t kGraphs = size_t{64} << 20;

Epilogue epilogue_of(const Activation& act) {
  return act.kind == Activation::kSilu       ? Epilogue::kSilu
         : act.kind == Activation::kGeluTanh ? Epilogue::kGeluTanh
         : act.both                          ? Epilogue::kReluBoth
                                             : Epilogue::kRelu;
}

void check_same_shape(const char* operation, Rows a, Rows b) {
  if (a.n == b.n && a.width == b.width) return;
  throw_error(ErrorKind::kValue, "%s: rows of %lld x %lld and %lld x %lld, expected equal shapes",
              operation, static_cast<long long>(a.n), static_cast<long long>(a.width),
              static_cast<long long>(b.n), static_cast<long long>(b.width));
}

void check_norm(const char* operation, const Norm& norm, int64_t width) {
  const bool bias_fits = !norm.bias || norm.bias->size() == width;
  if (!norm.weight || (norm.weight->size() == width && bias_fits)) return;
  throw_error(ErrorKind::kValue, "%s: a norm of %lld elements on rows of %lld", operation,
              static_cast<long long>(norm.weight->size()), static_cast<long long>(width));
}

const CudaWeight& cuda_weight(const Weight& weight) {
  return static_cast<const CudaWeight&>(weight);
}

bool same(const Norm& a, const Norm& b) {
  return a.weight == b.weight && a.bias == b.bias && a.kind == b.kind && a.eps == b.eps;
}

constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

void check_attend(const AttentionSpec& spec, const KvSpec& kv, Rows q, Rows k, Rows v,
                  int64_t layer, int64_t first, Rows out) {
  const auto expect = [](const char* what, int64_t found, int64_t expected) {
    if (found == expected) return;
    throw_error(ErrorKind::kValue, "attend: %s is %lld, expected %lld", what,
                static_cast<long long>(found), static_cast<long long>(expected));
  };
  expect("head_dim", spec.head_dim, kv.head_dim);
  expect("the width of keys", spec.n_head_kv * spec.head_dim, kv.row_width);
  expect("n_head modulo n_head_kv", spec.n_head_kv < 1 ? -1 : spec.n_head % spec.n_head_kv, 0);
  expect("q's width", q.width, spec.n_head * spec.head_dim);
  expect("out's width", out.width, q.width);
  expect("k's width", k.width, kv.row_width);
  expect("v's width", v.width, kv.row_width);
  expect("rows of k", k.n, q.n);
  expect("rows of v", v.n, q.n);
  expect("rows of out", out.n, q.n);
  if (spec.rope != RopeKind::kNone) {
    const auto pairs = spec.rope_freq ? static_cast<int64_t>(spec.rope_freq->size()) : 0;
    expect("rope frequencies", pairs, spec.rope_dim / 2);
    if (spec.rope_dim > spec.head_dim) expect("rope_dim", spec.rope_dim, spec.head_dim);
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

// The lock of an operation on rows, and what the one before it left.
class CudaBackend::Operation {
 public:
  explicit Operation(CudaBackend& backend)
      : lock_(*backend.context_), ready_(std::exchange(backend.ready_, {})) {}
  const Ready& ready() const { return ready_; }

 private:
  const Context::Lock lock_;
  const Ready ready_;
};

CudaBackend::CudaBackend(const CudaOptions& options)
    : options_(options), context_(std::make_shared<Context>(options.device, options.memory_limit)) {
  check_limit();  // before cuBLAS asks for its part
  gemm_ = Gemm::open(context_, &no_gemm_);
  check_limit();
}

void CudaBackend::check_limit() const {
  if (context_->limit() > own_memory()) return;
  const auto mib = [](size_t n) { return static_cast<double>(n) / 0x1p20; };
  throw_error(ErrorKind::kMemory,
              "%s is %.1f MiB, but the GPU backend needs %.1f MiB for its own work, and the model "
              "comes beside that: raise it, or compute on the CPU with n_gpu_layers=0",
              options_.memory_limit > 0 ? "vram_limit" : "the GPU's free memory",
              mib(context_->limit()), mib(own_memory()));
}

BackendInfo CudaBackend::info() const {
  const cudaDeviceProp& p = context_->properties();
  const std::string isa = format_string("sm_%d%d", p.major, p.minor);
  std::string text = format_string("CUDA, %s, %s, %.1f GiB of device memory%s", p.name, isa.c_str(),
                                   static_cast<double>(context_->limit()) / 0x1p30,
                                   options_.f32_activations ? ", float32 activations" : "");
  if (!gemm_) text += "; without cuBLAS, prompts run 16 tokens at a time (" + no_gemm_ + ")";
  BackendInfo info;
  info.name = "CUDA";
  info.isa = isa;
  info.description = text;
  info.device_memory = context_->limit() - own_memory();
  info.device_own = own_memory();
  info.loads_ahead = true;
  info.device = p.name;
  info.device_peak = context_->peak();
  return info;
}

// Working memory that does not grow with a session's batches.
size_t CudaBackend::own_memory() const {
  return kSmallThings + kGraphs + kPartialBytes + kLoadPiece + (gemm_ ? Gemm::own_memory() : 0);
}

// ---- Memory

BufferPtr CudaBackend::allocate(int64_t n_floats) {
  if (n_floats < 0 || n_floats > (int64_t{1} << 44)) {
    throw_error(ErrorKind::kValue, "a buffer of %lld floats cannot be allocated",
                static_cast<long long>(n_floats));
  }
  const Context::Lock lock(*context_);
  return std::make_shared<CudaBuffer>(context_, n_floats);
}

void CudaBackend::read(const float* from, float* to_host, int64_t n) {
  const Context::Lock lock(*context_);
  if (n > 0) context_->copy_out(to_host, from, static_cast<size_t>(n) * sizeof(float));
}

void CudaBackend::write(const float* from_host, float* to, int64_t n) {
  const Operation operation(*this);
  if (n > 0) context_->copy_in(to, from_host, static_cast<size_t>(n) * sizeof(float));
}

void CudaBackend::copy(Rows from, Rows to) {
  check_same_shape("copy", from, to);
  const Operation operation(*this);
  if (from.n < 1 || from.width < 1) return;
  const auto bytes = [](int64_t floats) { return static_cast<size_t>(floats) * sizeof(float); };
  COREINFER_CUDA_CHECK(cudaMemcpy2DAsync(to.data, bytes(to.stride), from.data, bytes(from.stride),
                                         bytes(from.width), static_cast<size_t>(from.n),
                                         cudaMemcpyDeviceToDevice, context_->stream_for_copy()));
}

BufferPtr CudaBackend::load_vector(const Mat& mat) {
  const Context::Lock lock(*context_);
  auto buffer = std::make_shared<CudaBuffer>(context_, mat.rows * mat.cols);
  const Memory raw(context_, mat.bytes(), "loading");
  context_->defer(false);
  context_->copy_in(raw.as<void>(), mat.data, mat.bytes());
  dequantize_source(*context_, mat.type, raw.as<uint8_t>(), mat.rows, mat.cols, 1.0f, false,
                    buffer->data(), mat.cols);
  return buffer;
}

WeightPtr CudaBackend::load(const Mat& mat) {
  const Context::Lock lock(*context_);
  auto weight = load_weight(context_, mat, &raw_);
  // Patches come from memory that is not theirs for long.
  std::erase_if(loaded_, [](const auto& entry) { return entry.second.expired(); });
  loaded_[mat.data] = weight;
  return weight;
}

uint64_t CudaBackend::loaded_bytes(DType type, int64_t rows, int64_t cols) const {
  WeightView view;
  return Context::taken_by(layout_planes(type, rows, cols, chunks_of(type, cols), 0, &view).end);
}

KvCachePtr CudaBackend::make_kv_cache(const KvSpec& spec) {
  const Context::Lock lock(*context_);
  return std::make_unique<CudaKvCache>(context_, spec);
}

const float* CudaBackend::frequencies(const std::shared_ptr<const std::vector<float>>& host) {
  if (!host || host->empty()) return nullptr;
  Memory& memory = frequencies_[host];
  if (memory.size() == 0) {
    memory = Memory(context_, host->size() * sizeof(float), "rope frequencies");
    context_->copy_in(memory.as<void>(), host->data(), host->size() * sizeof(float));
  }
  return memory.as<float>();
}

// Counters of blocks; kernels leave them zero.
int32_t* CudaBackend::zeros(size_t n) {
  const size_t bytes = n * sizeof(int32_t);
  if (zeros_.size() < bytes) {
    zeros_.ensure(context_, bytes, "counters");
    context_->clear(zeros_.as<void>(), bytes);
  }
  return zeros_.as<int32_t>();
}

// ---- Rows

void CudaBackend::embed(std::span<const int32_t> tokens, const Mat& table, float scale,
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
  const Operation operation(*this);
  if (n == 0) return;
  // Rows as the file has them, tokens first: the tables themselves stay in host memory.
  const size_t row = table.stride();
  const size_t position_start = static_cast<size_t>(round_up(static_cast<int64_t>(row) * n, 256));
  const size_t position_bytes = positions.empty() ? 0 : positions.stride() * static_cast<size_t>(n);
  std::vector<std::byte> bytes(position_start + position_bytes);
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::memcpy(bytes.data() + i * row, table.row(tokens[i]), row);
  }
  if (!positions.empty()) {
    std::memcpy(bytes.data() + position_start, positions.row(first_position), position_bytes);
  }
  token_rows_.ensure(context_, bytes.size(), "embeddings");
  context_->copy_in(token_rows_.as<void>(), bytes.data(), bytes.size());
  context_->defer(n <= kExactRows);
  dequantize_source(*context_, table.type, token_rows_.as<uint8_t>(), n, table.cols, scale, false,
                    out.data, out.stride);
  if (!positions.empty()) {
    dequantize_source(*context_, positions.type, token_rows_.as<uint8_t>() + position_start, n,
                      positions.cols, 1.0f, true, out.data, out.stride);
  }
}

void CudaBackend::norm(Rows x, const Norm& norm, Rows out) {
  check_same_shape("norm", x, out);
  check_norm("norm", norm, x.width);
  const Operation operation(*this);
  if (x.n == 0) return;
  context_->defer(x.n <= kExactRows);
  PreparedRows to{};
  to.values = out.data;
  to.values_stride = out.stride;
  prepare_rows(*context_, x, norm, nullptr, x.width, to);
}

void CudaBackend::add(Rows x, Rows y, const Norm& norm, const Norm& next) {
  check_same_shape("add", x, y);
  check_norm("add", norm, y.width);
  const Operation operation(*this);
  if (x.n == 0) return;
  context_->defer(x.n <= kExactRows);
  PreparedRows prepared{};
  if (x.n <= kExactRows && next.weight) {
    check_norm("add", next, x.width);
    prepared = room_for_ready(normed_, x.width, true, !options_.f32_activations);
    ready_ = {x, prepared, next};
  }
  add_rows(*context_, x, y, norm, next, prepared);
}

// ---- Matrices

// Every form that the weights of an operation want of its input, in the scratch memory.
class CudaBackend::Inputs {
 public:
  Inputs(CudaBackend& backend, Rows x, const Norm& norm, const Ready& ready)
      : backend_(backend), x_(x), norm_(norm), ready_(ready) {}

  bool floats(const CudaWeight& w) const {
    return !w.quantized() || backend_.options_.f32_activations;
  }

  void want(const CudaWeight& w) {
    if (w.cols() != x_.width) {
      throw_error(ErrorKind::kValue, "a matrix of %lld columns times rows of %lld",
                  static_cast<long long>(w.cols()), static_cast<long long>(x_.width));
    }
    Form* form = find(w);
    if (form == nullptr) {
      if (n_forms_ == kMaxForms) throw_error(ErrorKind::kValue, "too many kinds of input at once");
      form = &forms_[n_forms_++];
      form->columns = w.input_columns();
      form->n_columns = w.input_columns() != nullptr ? int64_t{w.view().n_chunks} * kChunk
                                                     : round_up(x_.width, kChunk);
    }
    (floats(w) ? form->values : form->codes) = true;
  }

  // Launches what makes the forms.
  void prepare() {
    const int64_t n = x_.n;
    size_t bytes = 0;
    const auto place = [&bytes](size_t size) {
      const size_t at = bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    struct Places {
      size_t values, codes, chunks;
    } places[kMaxForms];
    for (int i = 0; i < n_forms_; ++i) {
      const Form& f = forms_[i];
      const auto size = static_cast<size_t>(n * f.n_columns);
      places[i] = {place(f.values ? size * 4 : 0), place(f.codes ? size : 0),
                   place(f.codes ? size / kChunk * sizeof(ChunkInput) : 0)};
    }
    backend_.inputs_.ensure(backend_.context_, bytes, "rows");
    auto* base = backend_.inputs_.as<unsigned char>();
    for (int i = 0; i < n_forms_; ++i) {
      Form& f = forms_[i];
      PreparedRows& r = f.rows;
      if (f.values && !f.codes && fits_as_it_is(f)) {
        r.values = x_.data;
        r.values_stride = x_.stride;
        continue;
      }
      if (is_ready(f)) {
        r = ready_.prepared;
        continue;
      }
      if (f.values) r.values = reinterpret_cast<float*>(base + places[i].values);
      if (f.codes) {
        r.codes = reinterpret_cast<int8_t*>(base + places[i].codes);
        r.chunks = reinterpret_cast<ChunkInput*>(base + places[i].chunks);
      }
      r.values_stride = r.codes_stride = f.n_columns;
      r.chunks_stride = f.n_columns / kChunk;
      prepare_rows(*backend_.context_, x_, norm_, f.columns, f.n_columns, r);
    }
  }

  const PreparedRows& of(const CudaWeight& w) { return find(w)->rows; }

 private:
  static constexpr int kMaxForms = 4;
  struct Form {
    const int32_t* columns = nullptr;
    int64_t n_columns = 0;
    bool values = false, codes = false;
    PreparedRows rows{};
  };

  Form* find(const CudaWeight& w) {
    for (int i = 0; i < n_forms_; ++i) {
      if (forms_[i].columns == w.input_columns()) return &forms_[i];
    }
    return nullptr;
  }

  bool fits_as_it_is(const Form& f) const {
    return !norm_.weight && f.columns == nullptr && f.n_columns == x_.width && x_.stride % 4 == 0 &&
           reinterpret_cast<uintptr_t>(x_.data) % 16 == 0;
  }

  bool is_ready(const Form& f) const {
    const Rows& r = ready_.rows;
    return f.columns == nullptr && r.data == x_.data && r.n == x_.n && r.width == x_.width &&
           r.stride == x_.stride && same(norm_, ready_.norm) &&
           (!f.values || ready_.prepared.values != nullptr) &&
           (!f.codes || ready_.prepared.codes != nullptr);
  }

  CudaBackend& backend_;
  Rows x_;
  const Norm& norm_;
  const Ready ready_;
  Form forms_[kMaxForms];
  int n_forms_ = 0;
};

bool CudaBackend::can_multiply(const Weight& weight) const {
  return gemm_ != nullptr && cuda_weight(weight).input_columns() == nullptr;
}

// Normalised rows for the matrix product, padded to whole chunks.
const float* CudaBackend::dense_values(Rows x, const Norm& norm, int64_t* stride) {
  if (!norm.weight) {
    *stride = x.stride;
    return x.data;
  }
  *stride = round_up(x.width, kChunk);
  inputs_.ensure(context_, static_cast<size_t>(x.n * *stride) * sizeof(float), "rows");
  PreparedRows to{};
  to.values = inputs_.as<float>();
  to.values_stride = *stride;
  prepare_rows(*context_, x, norm, nullptr, *stride, to);
  return to.values;
}

// For kExactRows rows, padded to whole chunks.
PreparedRows CudaBackend::room_for_ready(Memory& memory, int64_t width, bool values, bool codes) {
  width = round_up(width, kChunk);
  const auto n = static_cast<size_t>(kExactRows * width);
  memory.ensure(
      context_,
      (values ? n * sizeof(float) : 0) + (codes ? n + n / kChunk * sizeof(ChunkInput) : 0), "rows");
  auto* at = memory.as<unsigned char>();
  PreparedRows r{};
  r.values_stride = r.codes_stride = width;
  r.chunks_stride = width / kChunk;
  if (values) {
    r.values = reinterpret_cast<float*>(at);
    at += n * sizeof(float);
  }
  if (codes) {
    r.codes = reinterpret_cast<int8_t*>(at);
    r.chunks = reinterpret_cast<ChunkInput*>(at + n);
  }
  return r;
}

void CudaBackend::exact_linear(Rows x, const Norm& norm, std::span<const Linear> linears,
                               const Ready& ready) {
  Inputs inputs(*this, x, norm, ready);
  for (const Linear& l : linears) inputs.want(cuda_weight(*l.weight));
  inputs.prepare();
  // One launch for neighbours that are alike.
  for (size_t begin = 0; begin < linears.size();) {
    const CudaWeight& first = cuda_weight(*linears[begin].weight);
    MatvecArgs a{};
    a.x = inputs.of(first);
    a.n_rows = static_cast<int32_t>(x.n);
    size_t end = begin;
    for (; end < linears.size() && end - begin < kMaxJobs; ++end) {
      const Linear& l = linears[end];
      const CudaWeight& w = cuda_weight(*l.weight);
      if (w.view().format() != first.view().format() ||
          w.input_columns() != first.input_columns()) {
        break;
      }
      a.jobs[a.n_jobs++] = {w.view(),   l.bias != nullptr ? l.bias->data() : nullptr,
                            l.out.data, l.out.stride,
                            0,          l.accumulate ? 1 : 0};
    }
    matvec(*context_, a, inputs.floats(first));
    begin = end;
  }
}

void CudaBackend::linear(Rows x, const Norm& norm, std::span<const Linear> linears) {
  check_norm("linear", norm, x.width);
  const Operation operation(*this);
  if (x.n == 0) return;
  if (x.n <= kExactRows) {
    context_->defer(true);
    return exact_linear(x, norm, linears, operation.ready());
  }
  context_->defer(false);
  if (std::all_of(linears.begin(), linears.end(),
                  [&](const Linear& l) { return can_multiply(*l.weight); })) {
    int64_t stride = 0;
    const float* values = dense_values(x, norm, &stride);
    std::vector<Gemm::Product> products;
    for (const Linear& l : linears) {
      products.push_back(
          {&cuda_weight(*l.weight), l.out, l.accumulate, options_.f32_activations || l.f32});
    }
    gemm_->multiply(products, values, stride, x.n);
    for (const Linear& l : linears) {
      if (l.bias != nullptr) add_bias(*context_, l.out, l.bias->data());
    }
    return;
  }
  for (int64_t i = 0; i < x.n; i += kExactRows) {
    const int64_t n = std::min(kExactRows, x.n - i);
    std::vector<Linear> part(linears.begin(), linears.end());
    for (Linear& l : part) l.out = l.out.slice(i, n);
    exact_linear(x.slice(i, n), norm, part);
  }
}

void CudaBackend::exact_hidden(Rows x, const Norm& norm, const FfnWeights& ffn,
                               const Activation& act, Rows h, Rows act_gate, const Ready& ready) {
  const CudaWeight& up = cuda_weight(*ffn.up);
  const CudaWeight* gate = ffn.gate ? &cuda_weight(*ffn.gate) : nullptr;
  const float* up_bias = ffn.up_bias ? ffn.up_bias->data() : nullptr;
  const float* gate_bias = ffn.gate_bias ? ffn.gate_bias->data() : nullptr;
  if (gate != nullptr && gate->view().format() != up.view().format()) {
    // Of two types: two products, then the activation.
    hidden_.ensure(context_, static_cast<size_t>(kExactRows * h.width) * sizeof(float), "hidden");
    const Rows g{hidden_.as<float>(), x.n, h.width, h.width};
    const Linear both[] = {{&up, ffn.up_bias.get(), h, false},
                           {gate, ffn.gate_bias.get(), g, false}};
    exact_linear(x, norm, both, ready);
    return activate_rows(*context_, epilogue_of(act), act.threshold, h, g.data, g.stride,
                         act_gate.data, act_gate.stride);
  }
  Inputs inputs(*this, x, norm, ready);
  inputs.want(up);
  if (gate != nullptr) inputs.want(*gate);
  inputs.prepare();
  MatvecArgs a{};
  a.x = inputs.of(up);
  a.n_rows = static_cast<int32_t>(x.n);
  // Padded, where there is room, for a matrix of floats that comes next: core neurons are of any
  // number.
  const int64_t padded = round_up(h.width, kChunk);
  if (h.stride >= padded && h.stride % 4 == 0 && reinterpret_cast<uintptr_t>(h.data) % 16 == 0) {
    a.zeros = static_cast<int32_t>(padded - h.width);
    ready_ = {h, {}, {}};
    ready_.prepared.values = h.data;
    ready_.prepared.values_stride = h.stride;
  }
  a.epilogue = epilogue_of(act);
  a.threshold = act.threshold;
  a.jobs[a.n_jobs++] = {up.view(), up_bias, h.data, h.stride, 0, 0};
  if (gate != nullptr) a.jobs[a.n_jobs++] = {gate->view(), gate_bias, nullptr, 0, 0, 0};
  a.act_gate = act_gate.data;
  a.act_gate_stride = act_gate.data != nullptr ? act_gate.stride : 0;
  matvec(*context_, a, inputs.floats(up));
}

void CudaBackend::ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act,
                             Rows h, Rows act_gate) {
  check_norm("ffn_hidden", norm, x.width);
  const Operation operation(*this);
  if (x.n == 0) return;
  if (x.n <= kExactRows) {
    context_->defer(true);
    return exact_hidden(x, norm, ffn, act, h, act_gate, operation.ready());
  }
  context_->defer(false);
  if (gemm_ != nullptr) {
    int64_t stride = 0;
    const float* values = dense_values(x, norm, &stride);
    const bool exact = options_.f32_activations;
    std::vector<Gemm::Product> products{{&cuda_weight(*ffn.up), h, false, exact}};
    Rows gate;
    if (ffn.gate) {
      gate = act_gate;  // activated where it is
      if (gate.data == nullptr) {
        hidden_.ensure(context_, static_cast<size_t>(x.n * h.width) * sizeof(float), "hidden");
        gate = {hidden_.as<float>(), x.n, h.width, h.width};
      }
      products.push_back({&cuda_weight(*ffn.gate), gate, false, exact});
    }
    gemm_->multiply(products, values, stride, x.n);
    if (ffn.up_bias) add_bias(*context_, h, ffn.up_bias->data());
    if (ffn.gate && ffn.gate_bias) add_bias(*context_, gate, ffn.gate_bias->data());
    return activate_rows(*context_, epilogue_of(act), act.threshold, h, gate.data, gate.stride,
                         act_gate.data, act_gate.stride);
  }
  for (int64_t i = 0; i < x.n; i += kExactRows) {
    const int64_t n = std::min(kExactRows, x.n - i);
    exact_hidden(x.slice(i, n), norm, ffn, act, h.slice(i, n),
                 act_gate.data != nullptr ? act_gate.slice(i, n) : Rows{});
  }
}

// ---- Attention

void CudaBackend::attend(const AttentionSpec& spec, Rows q, Rows k, Rows v, KvCache& cache,
                         int64_t layer, int64_t first, Rows out) {
  check_attend(spec, cache.spec(), q, k, v, layer, first, out);
  const Operation operation(*this);
  if (q.n < 1) return;
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  const bool exact = q.n <= kExactRows;
  AttentionCall call{};
  call.frequencies = spec.rope == RopeKind::kNone ? nullptr : frequencies(spec.rope_freq);
  context_->defer(exact);
  call.keys = kv.keys(layer);
  call.values = kv.values(layer);
  call.n_ctx = kv.spec().n_ctx;
  const int64_t most = divide_up<int64_t>(call.n_ctx, kSpan);
  if (exact) {
    // Before the position is asked for: growing sends off what waits, positions with it. At once
    // for the whole context, so that nothing grows while tokens are decoded.
    partials_.ensure(context_, partial_bytes_of_rows(spec, kExactRows, most), "attention");
    call.partials = partials_.as<float>();
    call.arrived = zeros(static_cast<size_t>(kExactRows * spec.n_head));
    // Most probably for a quantised matrix; a chunk may not lie across heads.
    if (!options_.f32_activations && spec.head_dim % kChunk == 0) {
      call.prepared = room_for_ready(attended_, out.width, false, true);
    }
  }
  call.position = context_->position(first);
  call.first = call.position != nullptr ? 0 : first;
  call.q = q;
  call.k = k;
  call.v = v;
  const auto spans_for = [&](int64_t end) { return divide_up<int64_t>(end, kSpan); };
  if (exact) {
    // Powers of two, so that a step's launches change rarely.
    const auto wanted = static_cast<uint64_t>(std::max<int64_t>(4, spans_for(first + q.n)));
    call.n_spans = std::min(most, static_cast<int64_t>(std::bit_ceil(wanted)));
    call.out = out;
    call.span = kSpan;
    attend_rows(*context_, spec, call);
    if (call.prepared.codes != nullptr) ready_ = {out, call.prepared, {}};
    return;
  }
  rope_and_store(*context_, spec, call);
  call.out = out;
  choose_spans(*context_, spec, q.n, first + q.n, &call);
  if (call.n_spans > 1) {
    partials_.ensure(context_,
                     static_cast<size_t>(partial_floats(spec, q.n, call.n_spans)) * sizeof(float),
                     "attention");
    call.partials = partials_.as<float>();
  }
  attend_tiles(*context_, spec, call);
}

}  // namespace coreinfer::cuda
