// coreinfer._core.testing: any Backend through its interface alone, so that the tests put the same
// rows through the CPU backend and the CUDA library and compare.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda_loader.h"
#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "model/activation.h"
#include "neurons/statistic.h"

namespace coreinfer::python {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

struct AnyWeight {
  nb::bytes data;  // keeps mat.data alive
  Mat mat;
  WeightPtr weight;
};

struct AnyCompact {
  std::vector<AnyWeight> weights;  // of one layer: gate (where there is one), up, down
  std::vector<float> up_bias;
  size_t buffer_bytes = 0;
};

struct AnyCache {
  KvCachePtr cache;
  nb::bytes save(int64_t n) const {
    const std::vector<std::byte> bytes = cache->save(n);
    return nb::bytes(bytes.data(), bytes.size());
  }
  void restore(nb::bytes bytes, int64_t n) const {
    cache->restore({static_cast<const std::byte*>(bytes.data()), bytes.size()}, n);
  }
};

KvType kv_type(const std::string& name) {
  return name == "f32" ? KvType::kF32 : name == "q8_0" ? KvType::kQ8_0 : KvType::kF16;
}

class AnyBackend {
 public:
  AnyBackend(const std::string& name, bool f32_activations) {
    if (name == "CUDA") {
      CudaOptions options;
      options.f32_activations = f32_activations;
      backend_ = make_cuda_backend(options);
    } else {
      CpuOptions options;
      options.n_threads = 1;
      options.f32_activations = f32_activations;
      backend_ = make_cpu_backend(options);
    }
  }

  static DType type_of(const std::string& type_name) {
    const auto type = std::find_if(kDTypes.begin(), kDTypes.end(),
                                   [&](const DTypeTraits& t) { return t.name == type_name; });
    if (type == kDTypes.end()) throw_error(ErrorKind::kValue, "unknown type");
    return type->type;
  }

  uint64_t loaded_bytes(const std::string& type_name, int64_t rows, int64_t cols) const {
    return backend_->loaded_bytes(type_of(type_name), rows, cols);
  }

  AnyWeight load(const std::string& type_name, nb::bytes data, int64_t rows, int64_t cols) {
    const Mat mat{type_of(type_name), rows, cols, static_cast<const std::byte*>(data.data())};
    if (mat.bytes() != data.size()) throw_error(ErrorKind::kValue, "wrong number of bytes");
    return {data, mat, backend_->load(mat)};
  }

  Array<float> norm(Matrix x, FloatVector weight, std::optional<FloatVector> bias, float eps) {
    const Block in = block(x);
    const Norm n = make_norm(weight, bias, eps);
    backend_->norm(in.rows, n, in.rows);
    return array(in.rows);
  }

  Array<float> add(Matrix x, Matrix y, std::optional<FloatVector> weight, float eps) {
    const Block a = block(x), b = block(y);
    backend_->add(a.rows, b.rows, weight ? make_norm(*weight, {}, eps) : Norm{}, Norm{});
    return array(a.rows);
  }

  std::vector<Array<float>> linear(Matrix x, const std::vector<AnyWeight>& weights,
                                   std::optional<FloatVector> norm_weight,
                                   std::optional<FloatVector> bias, bool accumulate) {
    const Block in = block(x);
    const BufferPtr b = bias ? buffer(bias->data(), bias->size()) : nullptr;
    std::vector<Block> out;
    std::vector<Linear> linears;
    for (const AnyWeight& w : weights) {
      const std::vector<float> ones(static_cast<size_t>(in.rows.n * w.weight->rows()), 1.0f);
      out.push_back(block(ones.data(), in.rows.n, w.weight->rows()));
      linears.push_back({w.weight.get(), b.get(), out.back().rows, accumulate});
    }
    backend_->linear(in.rows, norm_weight ? make_norm(*norm_weight, {}, 1e-5f) : Norm{}, linears);
    std::vector<Array<float>> result;
    for (const Block& o : out) result.push_back(array(o.rows));
    return result;
  }

  std::pair<Array<float>, Array<float>> ffn_hidden(Matrix x, std::optional<AnyWeight> gate,
                                                   const AnyWeight& up,
                                                   const std::string& activation,
                                                   std::optional<FloatVector> up_bias) {
    const Block in = block(x);
    FfnWeights ffn;
    if (gate) ffn.gate = gate->weight;
    ffn.up = up.weight;
    if (up_bias) ffn.up_bias = buffer(up_bias->data(), up_bias->size());
    const Activation act = activation_named(activation).value();
    const BufferPtr h = backend_->allocate(in.rows.n * ffn.n_ff());
    const BufferPtr a = backend_->allocate(in.rows.n * ffn.n_ff());
    const Rows hr = h->rows(in.rows.n, ffn.n_ff()), ar = a->rows(in.rows.n, ffn.n_ff());
    backend_->ffn_hidden(in.rows, Norm{}, ffn, act, hr, ar);
    return {array(hr), array(ar)};
  }

  // down(silu(gate x) * (up x)), NaN behind the rows between as another text might have left it.
  Array<float> feed_forward(Matrix x, const AnyWeight& gate, const AnyWeight& up,
                            const AnyWeight& down) {
    const Block in = block(x);
    FfnWeights ffn;
    ffn.gate = gate.weight;
    ffn.up = up.weight;
    const int64_t n = in.rows.n, width = ffn.n_ff(), stride = (width + 31) / 32 * 32;
    const std::vector<float> nan(static_cast<size_t>(n * stride), std::nanf(""));
    const Block room = block(nan.data(), n, stride);
    const Rows hidden{room.rows.data, n, width, stride};
    const Block out = block(nan.data(), n, down.weight->rows());
    backend_->ffn_hidden(in.rows, Norm{}, ffn, Activation{}, hidden, Rows{});
    const Linear linears[] = {{down.weight.get(), nullptr, out.rows, false}};
    backend_->linear(hidden, Norm{}, linears);
    return array(out.rows);
  }

  AnyCompact compact(std::optional<AnyWeight> gate, const AnyWeight& up, const AnyWeight& down,
                     const std::vector<int32_t>& neurons, std::optional<FloatVector> up_bias) {
    CompactSource s;
    if (gate) s.gate = gate->mat;
    s.up = up.mat;
    s.down = down.mat;
    if (up_bias) s.up_bias = buffer(up_bias->data(), up_bias->size());
    s.neurons = neurons;
    CompactWeights made = backend_->compact({&s, 1}, nullptr);
    const FfnWeights& ffn = made.layers[0];
    AnyCompact result;
    if (ffn.gate) result.weights.push_back({{}, {}, ffn.gate});
    result.weights.push_back({{}, {}, ffn.up});
    result.weights.push_back({{}, {}, ffn.down});
    result.buffer_bytes = made.buffer_bytes;
    if (ffn.up_bias) {
      result.up_bias.resize(neurons.size());
      backend_->read(ffn.up_bias->data(), result.up_bias.data(), ffn.up_bias->size());
    }
    return result;
  }

  // Scores after adding the rows of h in pieces that begin at `cuts`, then a row of scores for each
  // of `marks`, as after so many rows; and the first row with NaN or Inf (-1: none).
  std::pair<Array<float>, int64_t> accumulate(const std::string& statistic, double alpha, Matrix h,
                                              FloatVector scores, const std::vector<int64_t>& cuts,
                                              const std::vector<int64_t>& marks) {
    const Block in = block(h);
    const auto width = static_cast<int64_t>(scores.size());
    std::vector<float> start((marks.size() + 1) * scores.size());
    std::copy_n(scores.data(), scores.size(), start.begin());
    const Block s = block(start.data(), static_cast<int64_t>(marks.size()) + 1, width);
    const Block bad = block(&kNoBadRow, 1, 1);
    for (size_t i = 0; i < cuts.size(); ++i) {
      const int64_t end = i + 1 < cuts.size() ? cuts[i + 1] : in.rows.n;
      std::vector<ScoreMark> within;
      for (size_t m = 0; m < marks.size(); ++m) {
        if (marks[m] <= cuts[i] || marks[m] > end) continue;
        within.push_back({marks[m] - cuts[i], s.rows.slice(static_cast<int64_t>(m) + 1, 1).data});
      }
      backend_->accumulate(statistic_from_name(statistic), alpha,
                           in.rows.slice(cuts[i], end - cuts[i]), s.rows.data, within, cuts[i],
                           bad.rows.data);
    }
    float first = 0.0f;
    backend_->read(bad.rows.data, &first, 1);
    return {array(s.rows), first < kNoBadRow ? static_cast<int64_t>(first) : -1};
  }

  std::vector<std::vector<int32_t>> select(Matrix scores, int64_t k) {
    return backend_->select(block(scores).rows, k);
  }

  Array<float> copy(Matrix x) {
    const Block from = block(x);
    const BufferPtr to = backend_->allocate(from.buffer->size());
    const Rows rows = to->rows(from.rows.n, from.rows.width);
    backend_->copy(from.rows, rows);
    return array(rows);
  }

  AnyCache cache(const std::string& type_k, const std::string& type_v, int64_t n_layer,
                 int64_t n_ctx, int64_t n_head_kv, int64_t head_dim) {
    KvSpec spec{kv_type(type_k), kv_type(type_v), n_layer, n_ctx, n_head_kv * head_dim, head_dim};
    return {backend_->make_kv_cache(spec)};
  }

  // rope: "", "interleaved", "halves"; of all of a head, base 10000.
  Array<float> attend(const AnyCache& cache, int64_t layer, int64_t first, Matrix q, Matrix k,
                      Matrix v, const std::string& rope, int64_t window, float softcap,
                      std::optional<FloatVector> head_norm) {
    const KvSpec& kv = cache.cache->spec();
    AttentionSpec spec;
    spec.head_dim = kv.head_dim;
    spec.n_head_kv = kv.row_width / kv.head_dim;
    spec.n_head = static_cast<int64_t>(q.shape(1)) / kv.head_dim;
    spec.scale = 1.0f / std::sqrt(static_cast<float>(kv.head_dim));
    spec.softcap = softcap;
    spec.window = window;
    if (head_norm) spec.q_norm = spec.k_norm = make_norm(*head_norm, {}, 1e-6f);
    if (!rope.empty()) {
      spec.rope = rope == "halves" ? RopeKind::kHalves : RopeKind::kInterleaved;
      spec.rope_dim = kv.head_dim;
      std::vector<float> freq;
      for (int64_t i = 0; i < kv.head_dim / 2; ++i) {
        freq.push_back(
            std::pow(10000.0f, -2.0f * static_cast<float>(i) / static_cast<float>(kv.head_dim)));
      }
      spec.rope_freq = std::make_shared<const std::vector<float>>(std::move(freq));
    }
    const Block a = block(q), b = block(k), c = block(v), out = block(q);
    backend_->attend(spec, a.rows, b.rows, c.rows, *cache.cache, layer, first, out.rows);
    return array(out.rows);
  }

  uint64_t device_peak() const { return backend_->info().device_peak; }
  std::string description() const { return backend_->info().description; }

 private:
  struct Block {
    BufferPtr buffer;
    Rows rows;
  };

  BufferPtr buffer(const float* data, size_t n) {
    BufferPtr b = backend_->allocate(static_cast<int64_t>(n));
    backend_->write(data, b->data(), static_cast<int64_t>(n));
    return b;
  }
  Block block(const float* data, int64_t n, int64_t width) {
    const BufferPtr b = buffer(data, static_cast<size_t>(n * width));
    return {b, b->rows(n, width)};
  }
  Block block(const Matrix& m) {
    return block(m.data(), static_cast<int64_t>(m.shape(0)), static_cast<int64_t>(m.shape(1)));
  }
  Norm make_norm(const FloatVector& weight, const std::optional<FloatVector>& bias, float eps) {
    Norm norm;
    norm.kind = bias ? NormKind::kLayer : NormKind::kRms;
    norm.weight = buffer(weight.data(), weight.size());
    if (bias) norm.bias = buffer(bias->data(), bias->size());
    norm.eps = eps;
    return norm;
  }
  Array<float> array(Rows rows) {
    Array<float> out =
        make_array<float>({static_cast<size_t>(rows.n), static_cast<size_t>(rows.width)});
    backend_->read(rows.data, out.data(), rows.n * rows.width);
    return out;
  }

  std::unique_ptr<Backend> backend_;
};

}  // namespace

void bind_testing_cuda(nb::module_& testing) {
  nb::class_<AnyWeight>(testing, "AnyWeight")
      .def_prop_ro("rows", [](const AnyWeight& w) { return w.weight->rows(); })
      .def_prop_ro("cols", [](const AnyWeight& w) { return w.weight->cols(); })
      .def_prop_ro("bytes", [](const AnyWeight& w) { return w.weight->bytes(); });
  nb::class_<AnyCompact>(testing, "AnyCompact")
      .def_ro("weights", &AnyCompact::weights)
      .def_ro("up_bias", &AnyCompact::up_bias)
      .def_ro("buffer_bytes", &AnyCompact::buffer_bytes);
  nb::class_<AnyCache>(testing, "AnyCache")
      .def("save", &AnyCache::save, nb::arg("n"))
      .def("restore", &AnyCache::restore, nb::arg("data"), nb::arg("n"));
  nb::class_<AnyBackend>(testing, "AnyBackend", "A backend by name: CPU (one thread) or CUDA.")
      .def(nb::init<const std::string&, bool>(), nb::arg("name"),
           nb::arg("f32_activations") = false)
      .def_prop_ro("description", &AnyBackend::description)
      .def_prop_ro("device_peak", &AnyBackend::device_peak)
      .def("loaded_bytes", &AnyBackend::loaded_bytes, nb::arg("type_name"), nb::arg("rows"),
           nb::arg("cols"))
      .def("load", &AnyBackend::load, nb::arg("type_name"), nb::arg("data"), nb::arg("rows"),
           nb::arg("cols"))
      .def("norm", &AnyBackend::norm, nb::arg("x"), nb::arg("weight"), nb::arg("bias") = nb::none(),
           nb::arg("eps") = 1e-5f)
      .def("add", &AnyBackend::add, nb::arg("x"), nb::arg("y"), nb::arg("weight") = nb::none(),
           nb::arg("eps") = 1e-5f)
      .def("linear", &AnyBackend::linear, nb::arg("x"), nb::arg("weights"),
           nb::arg("norm_weight") = nb::none(), nb::arg("bias") = nb::none(),
           nb::arg("accumulate") = false)
      .def("ffn_hidden", &AnyBackend::ffn_hidden, nb::arg("x"), nb::arg("gate").none(),
           nb::arg("up"), nb::arg("activation"), nb::arg("up_bias") = nb::none())
      .def("feed_forward", &AnyBackend::feed_forward, nb::arg("x"), nb::arg("gate"), nb::arg("up"),
           nb::arg("down"))
      .def("compact", &AnyBackend::compact, nb::arg("gate").none(), nb::arg("up"), nb::arg("down"),
           nb::arg("neurons"), nb::arg("up_bias") = nb::none())
      .def("accumulate", &AnyBackend::accumulate, nb::arg("statistic"), nb::arg("alpha"),
           nb::arg("h"), nb::arg("scores"), nb::arg("cuts") = std::vector<int64_t>{0},
           nb::arg("marks") = std::vector<int64_t>{})
      .def("select", &AnyBackend::select, nb::arg("scores"), nb::arg("k"))
      .def("copy", &AnyBackend::copy, nb::arg("x"))
      .def("cache", &AnyBackend::cache, nb::arg("type_k"), nb::arg("type_v"), nb::arg("n_layer"),
           nb::arg("n_ctx"), nb::arg("n_head_kv"), nb::arg("head_dim"))
      .def("attend", &AnyBackend::attend, nb::arg("cache"), nb::arg("layer"), nb::arg("first"),
           nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("rope") = "", nb::arg("window") = 0,
           nb::arg("softcap") = 0.0f, nb::arg("head_norm") = nb::none());
}

}  // namespace coreinfer::python
