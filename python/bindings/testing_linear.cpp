// coreinfer._core.testing: the matrix side of the CPU backend by itself (load, linear, ffn_hidden,
// embed, compact), on any instruction set of this machine, so that tests can compare it with NumPy.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "backend/cpu_backend.h"
#include "backend/cpu_weight.h"
#include "base/error.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "kernels/linear.h"
#include "model/activation.h"

namespace coreinfer::python {
namespace {

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

DType type_of(const std::string& name) {
  for (const DTypeTraits& t : kDTypes) {
    if (t.name == name) return t.type;
  }
  throw_error(ErrorKind::kValue, "unknown tensor type '%s'", name.c_str());
}

// A matrix as a file holds it, and as the backend loaded it.
struct TestWeight {
  nb::bytes data;  // keeps mat.data alive
  Mat mat;
  WeightPtr weight;

  const CpuWeight& cpu() const { return static_cast<const CpuWeight&>(*weight); }

  // The weights as the kernels of an instruction set unpack them, columns in input order.
  Array<float> values(const std::string& isa) const {
    const CpuWeight& w = cpu();
    if (!w.packed()) throw_error(ErrorKind::kValue, "only quantised types are packed");
    const auto rows = static_cast<size_t>(w.rows()), cols = static_cast<size_t>(w.cols());
    Array<float> out = make_array<float>({rows, cols});
    std::vector<float> panel(cols * kStripRows);
    const UnpackPanelFn unpack = linear_kernels(find_isa(isa)).unpack_panel(w.type());
    for (int64_t s = 0; s < w.strips().n_strips(); ++s) {
      unpack(w.strips(), s, 0, w.columns()->n_groups(), panel.data());
      for (const ColumnGroup& g : w.columns()->groups) {
        for (int32_t c = 0; c < g.n; ++c) {
          for (size_t r = 0; r < kStripRows; ++r) {
            const size_t row = static_cast<size_t>(s) * kStripRows + r;
            if (row >= rows) break;
            out.data()[row * cols + static_cast<size_t>(g.first + c)] =
                panel[static_cast<size_t>(g.before + c) * kStripRows + r];
          }
        }
      }
    }
    return out;
  }
};

struct TestCompact {
  std::vector<std::vector<TestWeight>> layers;  // gate where there is one, up, down
  std::vector<std::vector<float>> up_bias;
  size_t buffer_bytes = 0;
  size_t source_bytes = 0;
};

struct TestLayer {
  std::optional<TestWeight> gate;
  TestWeight up, down;
  std::vector<int32_t> neurons;
  std::vector<float> up_bias;
  bool zeros = false;
};

class TestBackend {
 public:
  TestBackend(const std::string& isa, bool f32_activations, int n_threads)
      : backend_({n_threads, f32_activations}, find_isa(isa)) {}

  TestWeight load(const std::string& type, nb::bytes data, int64_t rows, int64_t cols, bool zeros) {
    Mat mat{type_of(type), rows, cols, reinterpret_cast<const std::byte*>(data.c_str())};
    if (mat.bytes() != data.size()) {
      throw_error(ErrorKind::kValue, "%zu bytes of %s, expected %zu", data.size(), type.c_str(),
                  mat.bytes());
    }
    WeightPtr weight = zeros ? backend_.load_for_zeros(mat) : backend_.load(mat);
    return {std::move(data), mat, std::move(weight)};
  }

  // One output array (n, rows) a weight. biases: a float32 vector a weight, or empty.
  std::vector<Array<float>> linear(Matrix x, const std::vector<TestWeight>& weights,
                                   const std::vector<FloatVector>& biases,
                                   std::optional<FloatVector> norm_weight, bool accumulate) {
    const auto n = static_cast<int64_t>(x.shape(0));
    const BufferPtr in = buffer(x.data(), x.size());
    Norm norm;
    if (norm_weight) norm.weight = buffer(norm_weight->data(), norm_weight->size());
    std::vector<BufferPtr> outs, bias_buffers;
    std::vector<Linear> linears;
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t rows = weights[i].weight->rows();
      outs.push_back(backend_.allocate(n * rows));
      std::fill_n(outs[i]->data(), n * rows, accumulate ? 1.0f : 0.0f);
      if (!biases.empty()) bias_buffers.push_back(buffer(biases[i].data(), biases[i].size()));
      linears.push_back({weights[i].weight.get(), biases.empty() ? nullptr : bias_buffers[i].get(),
                         outs[i]->rows(n, rows), accumulate});
    }
    {
      nb::gil_scoped_release release;
      backend_.linear(in->rows(n, static_cast<int64_t>(x.shape(1))), norm, linears);
    }
    std::vector<Array<float>> result;
    for (size_t i = 0; i < weights.size(); ++i) {
      result.push_back(array(*outs[i], n, weights[i].weight->rows()));
    }
    return result;
  }

  std::pair<Array<float>, Array<float>> ffn_hidden(Matrix x, std::optional<TestWeight> gate,
                                                   const TestWeight& up,
                                                   const std::string& activation,
                                                   std::optional<FloatVector> up_bias) {
    const auto n = static_cast<int64_t>(x.shape(0));
    FfnWeights ffn;
    if (gate) ffn.gate = gate->weight;
    ffn.up = up.weight;
    if (up_bias) ffn.up_bias = buffer(up_bias->data(), up_bias->size());
    const Activation act = activation_named(activation).value();
    const BufferPtr in = buffer(x.data(), x.size());
    const BufferPtr h = backend_.allocate(n * ffn.n_ff()), a = backend_.allocate(n * ffn.n_ff());
    {
      nb::gil_scoped_release release;
      backend_.ffn_hidden(in->rows(n, static_cast<int64_t>(x.shape(1))), Norm{}, ffn, act,
                          h->rows(n, ffn.n_ff()), a->rows(n, ffn.n_ff()));
    }
    return {array(*h, n, ffn.n_ff()), array(*a, n, ffn.n_ff())};
  }

  Array<float> embed(Tokens tokens, const TestWeight& table, float scale,
                     std::optional<TestWeight> positions, int64_t first_position) {
    const auto n = static_cast<int64_t>(tokens.shape(0));
    const BufferPtr out = backend_.allocate(n * table.mat.cols);
    backend_.embed({tokens.data(), tokens.size()}, table.mat, scale,
                   positions ? positions->mat : Mat{}, first_position,
                   out->rows(n, table.mat.cols));
    return array(*out, n, table.mat.cols);
  }

  TestCompact compact(const std::vector<TestLayer>& layers) {
    std::vector<CompactSource> sources;
    for (const TestLayer& layer : layers) {
      CompactSource s;
      if (layer.gate) s.gate = layer.gate->mat;
      s.up = layer.up.mat;
      s.down = layer.down.mat;
      if (!layer.up_bias.empty()) s.up_bias = buffer(layer.up_bias.data(), layer.up_bias.size());
      s.neurons = layer.neurons;
      s.zeros = layer.zeros;
      sources.push_back(s);
    }
    CompactWeights made = backend_.compact(sources, nullptr);
    TestCompact result;
    result.buffer_bytes = made.buffer_bytes;
    result.source_bytes = made.source_bytes;
    for (const FfnWeights& ffn : made.layers) {
      auto& weights = result.layers.emplace_back();
      if (ffn.gate) weights.push_back({{}, {}, ffn.gate});
      weights.push_back({{}, {}, ffn.up});
      weights.push_back({{}, {}, ffn.down});
      auto& bias = result.up_bias.emplace_back();
      if (ffn.up_bias) bias.assign(ffn.up_bias->data(), ffn.up_bias->data() + ffn.n_ff());
    }
    return result;
  }

 private:
  BufferPtr buffer(const float* data, size_t n) {
    BufferPtr b = backend_.allocate(static_cast<int64_t>(n));
    backend_.write(data, b->data(), static_cast<int64_t>(n));
    return b;
  }

  static Array<float> array(const Buffer& b, int64_t n, int64_t width) {
    Array<float> out = make_array<float>({static_cast<size_t>(n), static_cast<size_t>(width)});
    std::memcpy(out.data(), b.data(), static_cast<size_t>(n * width) * sizeof(float));
    return out;
  }

  CpuBackend backend_;
};

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
  return names;
}

}  // namespace

void bind_testing_linear(nb::module_& testing) {
  testing.def("available_isas", &isa_names, "Names of the instruction sets that can run here.");
  nb::class_<TestWeight>(testing, "TestWeight")
      .def_prop_ro("rows", [](const TestWeight& w) { return w.weight->rows(); })
      .def_prop_ro("cols", [](const TestWeight& w) { return w.weight->cols(); })
      .def_prop_ro("bytes", [](const TestWeight& w) { return w.weight->bytes(); })
      .def_prop_ro("address",
                   [](const TestWeight& w) {
                     const CpuWeight& cpu = w.cpu();
                     return reinterpret_cast<uintptr_t>(cpu.packed() ? cpu.strips().data
                                                        : cpu.stored_by_columns()
                                                            ? cpu.by_columns().data
                                                            : cpu.plain().data);
                   })
      .def("values", &TestWeight::values, nb::arg("isa"));
  nb::class_<TestLayer>(testing, "TestLayer")
      .def(
          "__init__",
          [](TestLayer* self, std::optional<TestWeight> gate, TestWeight up, TestWeight down,
             std::vector<int32_t> neurons, std::vector<float> up_bias, bool zeros) {
            new (self) TestLayer{std::move(gate),    std::move(up),      std::move(down),
                                 std::move(neurons), std::move(up_bias), zeros};
          },
          nb::arg("gate").none(), nb::arg("up"), nb::arg("down"), nb::arg("neurons"),
          nb::arg("up_bias") = std::vector<float>{}, nb::arg("zeros") = false);
  nb::class_<TestCompact>(testing, "TestCompact")
      .def_ro("layers", &TestCompact::layers)
      .def_ro("up_bias", &TestCompact::up_bias)
      .def_ro("buffer_bytes", &TestCompact::buffer_bytes)
      .def_ro("source_bytes", &TestCompact::source_bytes);
  nb::class_<TestBackend>(testing, "TestBackend")
      .def(nb::init<const std::string&, bool, int>(), nb::arg("isa"),
           nb::arg("f32_activations") = false, nb::arg("n_threads") = 1)
      .def("load", &TestBackend::load, nb::arg("type_name"), nb::arg("data"), nb::arg("rows"),
           nb::arg("cols"), nb::arg("zeros") = false)
      .def("linear", &TestBackend::linear, nb::arg("x").noconvert(), nb::arg("weights"),
           nb::arg("biases") = std::vector<FloatVector>{}, nb::arg("norm_weight") = nb::none(),
           nb::arg("accumulate") = false)
      .def("ffn_hidden", &TestBackend::ffn_hidden, nb::arg("x").noconvert(), nb::arg("gate").none(),
           nb::arg("up"), nb::arg("activation"), nb::arg("up_bias") = nb::none())
      .def("embed", &TestBackend::embed, nb::arg("tokens").noconvert(), nb::arg("table"),
           nb::arg("scale") = 1.0f, nb::arg("positions") = nb::none(),
           nb::arg("first_position") = 0)
      .def("compact", &TestBackend::compact, nb::arg("layers"));
}

}  // namespace coreinfer::python
