// coreinfer._core.testing: everything of the CPU backend but its matrix products, on any
// instruction set of this machine: row functions, attention with its cache, neuron statistics, the
// thread pool.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "backend/cpu_backend.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "kernels/attention_block.h"
#include "kernels/count_row.h"
#include "kernels/vector.h"
#include "model/activation.h"

namespace coreinfer::python {
namespace {

using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalfVector = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using HalfMatrix = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CodeVector = nb::ndarray<const int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The enumerator whose place in the list is that of `name`.
template <typename Enum>
Enum find_name(const char* what, const std::string& name,
               std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* known : names) {
    if (name == known) return static_cast<Enum>(i);
    ++i;
  }
  throw_error(ErrorKind::kValue, "unknown %s '%s'", what, name.c_str());
}

RopeKind rope_kind(const std::string& name) {
  return find_name<RopeKind>("rope", name, {"none", "interleaved", "halves"});
}

KvType kv_type(const std::string& name) {
  return find_name<KvType>("KV type", name, {"f16", "f32", "q8_0"});
}

Statistic statistic(const std::string& name) {
  return find_name<Statistic>("statistic", name, {"count", "count_gate", "count_abs", "flock"});
}

int64_t size_of(const FloatVector& x) { return static_cast<int64_t>(x.size()); }

Array<float> copy(const float* data, std::initializer_list<size_t> shape, size_t n) {
  Array<float> a = make_array<float>(shape);
  if (n > 0) std::memcpy(a.data(), data, n * sizeof(float));
  return a;
}

Array<float> copy(FloatVector x) { return copy(x.data(), {x.size()}, x.size()); }

// ---- row functions

Array<float> rms_norm(const std::string& isa, FloatVector x, FloatVector weight, float eps) {
  Array<float> out = make_array<float>({x.size()});
  vector_kernels(find_isa(isa)).rms_norm(x.data(), weight.data(), eps, size_of(x), out.data());
  return out;
}

Array<float> layer_norm(const std::string& isa, FloatVector x, FloatVector weight,
                        std::optional<FloatVector> bias, float eps) {
  Array<float> out = make_array<float>({x.size()});
  vector_kernels(find_isa(isa))
      .layer_norm(x.data(), weight.data(), bias ? bias->data() : nullptr, eps, size_of(x),
                  out.data());
  return out;
}

std::pair<Array<float>, Array<float>> activate(const std::string& isa, const std::string& name,
                                               FloatVector gate, std::optional<FloatVector> up) {
  const Activation act = activation_named(name).value();
  Array<float> h = make_array<float>({gate.size()});
  Array<float> act_gate = make_array<float>({gate.size()});
  const ActivateFn activate = activation_kernel(vector_kernels(find_isa(isa)), act);
  activate(gate.data(), up ? up->data() : nullptr, size_of(gate), act.threshold, h.data(),
           act_gate.data());
  return {h, act_gate};
}

Array<float> add(const std::string& isa, FloatVector x, FloatVector y) {
  Array<float> out = copy(x);
  vector_kernels(find_isa(isa)).add(out.data(), y.data(), size_of(x));
  return out;
}

Array<float> scale(const std::string& isa, FloatVector x, float s) {
  Array<float> out = copy(x);
  vector_kernels(find_isa(isa)).scale(out.data(), s, size_of(x));
  return out;
}

Array<float> blend(const std::string& isa, FloatVector x, float a, FloatVector y, float b) {
  Array<float> out = copy(x);
  vector_kernels(find_isa(isa)).blend(out.data(), a, y.data(), b, size_of(x));
  return out;
}

Array<float> rope(const std::string& isa, const std::string& kind, FloatVector x, FloatVector cos,
                  FloatVector sin) {
  Array<float> out = copy(x);
  const VectorKernels& kernels = vector_kernels(find_isa(isa));
  const auto turn =
      rope_kind(kind) == RopeKind::kHalves ? kernels.rope_halves : kernels.rope_interleaved;
  turn(out.data(), cos.data(), sin.data(), size_of(cos));
  return out;
}

Array<float> widen(const std::string& isa, HalfVector x) {
  Array<float> out = make_array<float>({x.size()});
  attention_kernels(find_isa(isa)).f16_to_f32(x.data(), static_cast<int64_t>(x.size()), out.data());
  return out;
}

Array<uint16_t> narrow(const std::string& isa, FloatVector x) {
  Array<uint16_t> out = make_array<uint16_t>({x.size()});
  attention_kernels(find_isa(isa)).f32_to_f16(x.data(), size_of(x), out.data());
  return out;
}

std::pair<Array<int8_t>, Array<uint16_t>> quantize(const std::string& isa, FloatVector x) {
  Array<int8_t> codes = make_array<int8_t>({x.size()});
  Array<uint16_t> scales = make_array<uint16_t>({x.size() / kKvGroup});
  attention_kernels(find_isa(isa)).quantize(x.data(), size_of(x), codes.data(), scales.data());
  return {codes, scales};
}

// Rows of values, or, where the scales are those of a block, a block of keys.
Array<float> unpack(const std::string& isa, CodeVector codes, HalfVector scales, bool block) {
  Array<float> out = make_array<float>({codes.size()});
  const AttentionKernels& kernels = attention_kernels(find_isa(isa));
  const auto n = static_cast<int64_t>(codes.size());
  if (block) {
    kernels.unpack_block(codes.data(), scales.data(), n / kKvBlock, out.data());
  } else {
    kernels.unpack_row(codes.data(), scales.data(), n, out.data());
  }
  return out;
}

template <typename Kernel, typename Matrix>
Array<float> multiply_with(Kernel kernel, FloatMatrix a, Matrix b, std::optional<FloatMatrix> c) {
  const size_t rows = a.shape(0), depth = a.shape(1), cols = b.shape(1);
  Array<float> out = make_array<float>({rows, cols});
  if (c) std::memcpy(out.data(), c->data(), rows * cols * sizeof(float));
  const auto ld = [](size_t n) { return static_cast<int64_t>(n); };
  kernel(a.data(), ld(depth), b.data(), ld(cols), out.data(), ld(cols), ld(rows), ld(depth),
         ld(cols), c.has_value(), b.data());
  return out;
}

Array<float> multiply_f32(const std::string& isa, FloatMatrix a, FloatMatrix b,
                          std::optional<FloatMatrix> c) {
  return multiply_with(attention_kernels(find_isa(isa)).multiply_f32, a, b, c);
}

Array<float> multiply_f16(const std::string& isa, FloatMatrix a, HalfMatrix b,
                          std::optional<FloatMatrix> c) {
  return multiply_with(attention_kernels(find_isa(isa)).multiply_f16, a, b, c);
}

// Weights, factor for what came before, maximum, sum.
std::tuple<Array<float>, float, float, float> softmax(const std::string& isa, FloatVector s,
                                                      int64_t begin, int64_t end, float softcap,
                                                      float max, float sum) {
  Array<float> out = copy(s);
  const float correction = attention_kernels(find_isa(isa))
                               .softmax(out.data(), size_of(s), begin, end, softcap, &max, &sum);
  return {out, correction, max, sum};
}

// ---- the backend's operations

struct TestCache {
  KvCachePtr cache;

  nb::bytes save(int64_t n) const {
    const std::vector<std::byte> bytes = cache->save(n);
    return nb::bytes(bytes.data(), bytes.size());
  }
  void restore(nb::bytes bytes, int64_t n) {
    cache->restore({reinterpret_cast<const std::byte*>(bytes.c_str()), bytes.size()}, n);
  }
};

class TestVectorBackend {
 public:
  TestVectorBackend(const std::string& isa, int n_threads, bool f32_activations)
      : backend_({n_threads, f32_activations}, find_isa(isa)) {}

  TestCache make_cache(const std::string& type_k, const std::string& type_v, int64_t n_layer,
                       int64_t n_ctx, int64_t n_head_kv, int64_t head_dim) {
    const KvSpec spec{kv_type(type_k), kv_type(type_v),      n_layer,
                      n_ctx,           n_head_kv * head_dim, head_dim};
    return {backend_.make_kv_cache(spec)};
  }

  Array<float> norm(FloatMatrix x, std::optional<FloatVector> weight,
                    std::optional<FloatVector> bias, bool layer_norm, float eps) {
    const Norm norm = make_norm(weight, bias, layer_norm, eps);
    BufferPtr rows = buffer(x);
    const Rows view = rows->rows(static_cast<int64_t>(x.shape(0)), width(x));
    backend_.norm(view, norm, view);
    return array(*rows, x);
  }

  Array<float> add(FloatMatrix x, FloatMatrix y, std::optional<FloatVector> weight, float eps) {
    BufferPtr to = buffer(x), from = buffer(y);
    backend_.add(to->rows(static_cast<int64_t>(x.shape(0)), width(x)),
                 from->rows(static_cast<int64_t>(y.shape(0)), width(y)),
                 make_norm(weight, std::nullopt, false, eps), Norm{});
    return array(*to, x);
  }

  // One attention over q (n, n_head * head_dim), k and v (n, n_head_kv * head_dim).
  Array<float> attend(TestCache& cache, int64_t layer, int64_t first, FloatMatrix q, FloatMatrix k,
                      FloatMatrix v, int64_t n_head, float scale, float softcap, int64_t window,
                      std::optional<FloatVector> q_norm, std::optional<FloatVector> k_norm,
                      float eps, const std::string& rope, std::optional<FloatVector> freq,
                      float rope_scale) {
    AttentionSpec spec;
    spec.n_head = n_head;
    spec.head_dim = cache.cache->spec().head_dim;
    spec.n_head_kv = cache.cache->spec().row_width / spec.head_dim;
    spec.scale = scale;
    spec.softcap = softcap;
    spec.window = window;
    spec.q_norm = make_norm(q_norm, std::nullopt, false, eps);
    spec.k_norm = make_norm(k_norm, std::nullopt, false, eps);
    spec.rope = rope_kind(rope);
    if (freq) {
      spec.rope_dim = 2 * size_of(*freq);
      spec.rope_freq =
          std::make_shared<const std::vector<float>>(freq->data(), freq->data() + freq->size());
    }
    spec.rope_scale = rope_scale;
    const auto n = static_cast<int64_t>(q.shape(0));
    BufferPtr q_rows = buffer(q), k_rows = buffer(k), v_rows = buffer(v);
    BufferPtr out = backend_.allocate(static_cast<int64_t>(q.size()));
    {
      nb::gil_scoped_release release;
      backend_.attend(spec, q_rows->rows(n, width(q)), k_rows->rows(n, width(k)),
                      v_rows->rows(n, width(v)), *cache.cache, layer, first,
                      out->rows(n, width(q)));
    }
    return array(*out, q);
  }

  // Scores after adding the rows of h, and the first row with NaN or Inf (-1: none).
  std::pair<Array<float>, int64_t> accumulate(const std::string& name, double alpha, FloatMatrix h,
                                              FloatVector scores) {
    Array<float> sums = copy(scores);
    BufferPtr rows = buffer(h);
    float bad = kNoBadRow;
    {
      nb::gil_scoped_release release;
      backend_.accumulate(statistic(name), alpha,
                          rows->rows(static_cast<int64_t>(h.shape(0)), width(h)), sums.data(), {},
                          0, &bad);
    }
    return {sums, bad < kNoBadRow ? static_cast<int64_t>(bad) : -1};
  }

  Array<int32_t> select(FloatVector scores, int64_t k) {
    const BufferPtr row = buffer(scores);
    return copy_array<int32_t>(backend_.select(row->rows(1, row->size()), k)[0]);
  }

 private:
  static int64_t width(const FloatMatrix& x) { return static_cast<int64_t>(x.shape(1)); }

  BufferPtr buffer(const float* data, size_t n) {
    BufferPtr b = backend_.allocate(static_cast<int64_t>(n));
    backend_.write(data, b->data(), static_cast<int64_t>(n));
    return b;
  }
  BufferPtr buffer(const FloatMatrix& x) { return buffer(x.data(), x.size()); }
  BufferPtr buffer(const FloatVector& x) { return buffer(x.data(), x.size()); }

  Array<float> array(const Buffer& b, const FloatMatrix& like) {
    return copy(b.data(), {like.shape(0), like.shape(1)}, like.size());
  }

  Norm make_norm(std::optional<FloatVector> weight, std::optional<FloatVector> bias,
                 bool layer_norm, float eps) {
    return {layer_norm ? NormKind::kLayer : NormKind::kRms, weight ? buffer(*weight) : nullptr,
            bias ? buffer(*bias) : nullptr, eps};
  }

  CpuBackend backend_;
};

// ---- the pool

// Squares of [0, n), summed, n_jobs times: squared in a first phase, in equal chunks, claimed by
// shares and added in a second.
std::vector<int64_t> pool_sums(int n_threads, int n_jobs, int64_t n, int64_t chunk) {
  ThreadPool pool(n_threads);
  std::vector<int64_t> sums;
  std::vector<int64_t> squares(static_cast<size_t>(n));
  std::vector<int64_t> partial(static_cast<size_t>(n_threads));
  for (int job = 0; job < n_jobs; ++job) {
    pool.run([&](ThreadPool::Context& context) {
      int64_t begin, end;
      while (context.next(n, chunk, &begin, &end)) {
        for (; begin < end; ++begin) squares[static_cast<size_t>(begin)] = begin * begin + job;
      }
      context.barrier();
      int64_t sum = 0;
      while (context.next_share(n, chunk, &begin, &end)) {
        for (; begin < end; ++begin) sum += squares[static_cast<size_t>(begin)] - job;
      }
      partial[static_cast<size_t>(context.thread())] = sum;
    });
    int64_t sum = 0;
    for (int64_t p : partial) sum += p;
    sums.push_back(sum);
  }
  return sums;
}

// The same sums, by jobs that not every thread has to come to; and how many came to each job.
std::vector<std::pair<int64_t, int>> pool_shared_sums(int n_threads, int n_jobs, int64_t n,
                                                      int64_t chunk) {
  ThreadPool pool(n_threads);
  std::vector<std::pair<int64_t, int>> results;
  for (int job = 0; job < n_jobs; ++job) {
    std::vector<int64_t> partial(static_cast<size_t>(n_threads), -1);
    pool.share([&](ThreadPool::Context& context) {
      int64_t begin, end, sum = 0;
      while (context.next(n, chunk, &begin, &end)) {
        for (; begin < end; ++begin) sum += begin * begin;
      }
      partial[static_cast<size_t>(context.thread())] = sum;
    });
    std::pair<int64_t, int> result{0, 0};
    for (const int64_t p : partial) {
      if (p < 0) continue;
      result.first += p;
      ++result.second;
    }
    results.push_back(result);
  }
  return results;
}

// A job that throws on one thread; then one that does not, whose result is returned.
int pool_after_throw(int n_threads, int thread) {
  ThreadPool pool(n_threads);
  bool thrown = false;
  try {
    pool.run([&](ThreadPool::Context& context) {
      if (context.thread() == thread) throw std::runtime_error("from a worker");
    });
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  std::vector<int> ran(static_cast<size_t>(n_threads));
  pool.run([&](ThreadPool::Context& context) { ran[static_cast<size_t>(context.thread())] = 1; });
  int total = 0;
  for (int r : ran) total += r;
  return thrown ? total : -1;
}

}  // namespace

void bind_testing_vector(nb::module_& testing) {
  using nb::arg;
  testing.attr("KV_BLOCK") = kKvBlock;
  testing.def("rms_norm", &rms_norm, arg("isa"), arg("x").noconvert(), arg("weight").noconvert(),
              arg("eps"));
  testing.def("layer_norm", &layer_norm, arg("isa"), arg("x").noconvert(),
              arg("weight").noconvert(), arg("bias").noconvert().none(), arg("eps"));
  testing.def("activate", &activate, arg("isa"), arg("name"), arg("gate").noconvert(),
              arg("up").noconvert().none());
  testing.def("add", &add, arg("isa"), arg("x").noconvert(), arg("y").noconvert());
  testing.def("scale", &scale, arg("isa"), arg("x").noconvert(), arg("s"));
  testing.def("blend", &blend, arg("isa"), arg("x").noconvert(), arg("a"), arg("y").noconvert(),
              arg("b"));
  testing.def("rope", &rope, arg("isa"), arg("kind"), arg("x").noconvert(), arg("cos").noconvert(),
              arg("sin").noconvert());
  testing.def("f16_to_f32", &widen, arg("isa"), arg("x").noconvert());
  testing.def("f32_to_f16", &narrow, arg("isa"), arg("x").noconvert());
  testing.def("kv_quantize", &quantize, arg("isa"), arg("x").noconvert());
  testing.def("kv_unpack", &unpack, arg("isa"), arg("codes").noconvert(), arg("scales").noconvert(),
              arg("block") = false);
  testing.def("multiply_f32", &multiply_f32, arg("isa"), arg("a").noconvert(), arg("b").noconvert(),
              arg("c").noconvert() = nb::none());
  testing.def("multiply_f16", &multiply_f16, arg("isa"), arg("a").noconvert(), arg("b").noconvert(),
              arg("c").noconvert() = nb::none());
  testing.def("softmax", &softmax, arg("isa"), arg("s").noconvert(), arg("begin"), arg("end"),
              arg("softcap"), arg("max"), arg("sum"));
  testing.def("pool_sums", &pool_sums, arg("n_threads"), arg("n_jobs"), arg("n"), arg("chunk"),
              nb::call_guard<nb::gil_scoped_release>());
  testing.def("pool_shared_sums", &pool_shared_sums, arg("n_threads"), arg("n_jobs"), arg("n"),
              arg("chunk"), nb::call_guard<nb::gil_scoped_release>());
  testing.def("pool_after_throw", &pool_after_throw, arg("n_threads"), arg("thread"),
              nb::call_guard<nb::gil_scoped_release>());
  testing.def("default_threads", &ThreadPool::default_threads);

  nb::class_<TestCache>(testing, "TestCache")
      .def_prop_ro("committed_bytes", [](const TestCache& c) { return c.cache->committed_bytes(); })
      .def("save", &TestCache::save, arg("n"))
      .def("restore", &TestCache::restore, arg("data"), arg("n"));
  nb::class_<TestVectorBackend>(testing, "TestVectorBackend")
      .def(nb::init<const std::string&, int, bool>(), arg("isa"), arg("n_threads") = 1,
           arg("f32_activations") = false)
      .def("make_cache", &TestVectorBackend::make_cache, arg("type_k"), arg("type_v"),
           arg("n_layer"), arg("n_ctx"), arg("n_head_kv"), arg("head_dim"))
      .def("norm", &TestVectorBackend::norm, arg("x").noconvert(), arg("weight").noconvert().none(),
           arg("bias").noconvert() = nb::none(), arg("layer_norm") = false, arg("eps") = 1e-5f)
      .def("add", &TestVectorBackend::add, arg("x").noconvert(), arg("y").noconvert(),
           arg("weight").noconvert() = nb::none(), arg("eps") = 1e-5f)
      .def("attend", &TestVectorBackend::attend, arg("cache"), arg("layer"), arg("first"),
           arg("q").noconvert(), arg("k").noconvert(), arg("v").noconvert(), arg("n_head"),
           arg("scale") = 1.0f, arg("softcap") = 0.0f, arg("window") = 0,
           arg("q_norm").noconvert() = nb::none(), arg("k_norm").noconvert() = nb::none(),
           arg("eps") = 1e-5f, arg("rope") = "none", arg("freq").noconvert() = nb::none(),
           arg("rope_scale") = 1.0f)
      .def("accumulate", &TestVectorBackend::accumulate, arg("statistic"), arg("alpha"),
           arg("h").noconvert(), arg("scores").noconvert())
      .def("select", &TestVectorBackend::select, arg("scores").noconvert(), arg("k"));
}

}  // namespace coreinfer::python
