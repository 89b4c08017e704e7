#include "engine/engine.h"

#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "base/memory_use.h"
#include "bindings/arrays.h"
#include "bindings/module.h"
#include "model/activation.h"

namespace coreinfer::python {
namespace {

nb::dict config_dict(const Engine& engine) {
  const ModelConfig& c = engine.config();
  nb::dict d;
  d["architecture"] = c.architecture;
  d["n_layer"] = c.n_layer;
  d["n_embd"] = c.n_embd;
  d["n_ff"] = c.n_ff;
  d["n_head"] = c.n_head;
  d["n_head_kv"] = c.n_head_kv;
  d["head_dim"] = c.head_dim;
  d["n_vocab"] = c.n_vocab;
  d["n_ctx_train"] = c.n_ctx;
  d["activation"] = activation_name(c.activation);
  d["gated"] = c.gated;
  return d;
}

nb::dict backend_dict(const Engine& engine) {
  const BackendInfo info = engine.backend().info();
  nb::dict d;
  d["name"] = info.name;
  d["isa"] = info.isa;
  d["n_threads"] = info.n_threads;
  d["description"] = info.description;
  d["device_memory"] = info.device_memory;
  d["device_peak"] = info.device_peak;
  return d;
}

std::shared_ptr<const Engine> load(nb::handle source, int n_threads, bool f32_activations,
                                   const std::string& activation, uint64_t memory_limit,
                                   double core_share, std::optional<bool> dense,
                                   std::optional<int64_t> n_ctx, int64_t n_batch,
                                   const std::string& type_k, const std::string& type_v,
                                   int64_t samples, int64_t n_gpu_layers, int main_gpu,
                                   uint64_t vram_limit,
                                   const std::function<void(float)>& progress) {
  EngineOptions options;
  options.n_gpu_layers = n_gpu_layers;
  options.main_gpu = main_gpu;
  options.vram_limit = vram_limit;
  options.memory_limit = memory_limit;
  options.activation = activation;
  options.core_share = core_share;
  options.dense = dense;
  if (n_ctx) {
    options.session = {*n_ctx, n_batch, kv_type_from_name(type_k), kv_type_from_name(type_v)};
    options.samples = samples;
  }
  options.cpu.n_threads = n_threads;
  options.cpu.f32_activations = f32_activations;
  // Loading checks for Ctrl-C with every layer, whether or not progress is wanted.
  options.progress = [&progress](float share) {
    nb::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
    if (progress) progress(share);
  };
  const std::shared_ptr<const GgufFile> file = gguf_file(source);
  const std::string path = file ? "" : system_path(source);
  nb::gil_scoped_release release;
  return file ? Engine::load(file, options) : Engine::load(path, options);
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<Engine>(m, "Engine", "A loaded model on a backend, constant; shared by sessions.")
      .def(nb::new_(&load), nb::arg("source"), nb::kw_only(), nb::arg("n_threads") = 0,
           nb::arg("f32_activations") = false, nb::arg("activation") = "",
           nb::arg("memory_limit") = 0, nb::arg("core_share") = 0.0, nb::arg("dense") = nb::none(),
           nb::arg("n_ctx") = nb::none(), nb::arg("n_batch") = 512, nb::arg("type_k") = "f16",
           nb::arg("type_v") = "f16", nb::arg("samples") = 0, nb::arg("n_gpu_layers") = 0,
           nb::arg("main_gpu") = 0, nb::arg("vram_limit") = 0, nb::arg("progress") = nb::none(),
           "Loads a GGUF file (a path: str, bytes or os.PathLike; or a GgufFile). memory_limit "
           "leaves room for a Session of n_ctx, n_batch, type_k and type_v that keeps so many FFN "
           "samples (n_ctx None: for none), and for core weights of core_share, "
           "beside all dense ones (dense True), without them (False), or as there is room. "
           "activation stands in for what the file says (\"\": nothing). Raises "
           "GGUFError for a malformed or unsupported "
           "file, OSError where it cannot be read and MemoryError for a limit that is too low.")
      .def_prop_ro("gguf", [](const Engine& e) { return gguf_object(e.shared_file()); })
      .def_prop_ro("config", &config_dict)
      .def_prop_ro("backend", &backend_dict)
      .def_prop_ro("fingerprint", [](const Engine& e) { return e.fingerprint(); })
      .def_prop_ro(
          "weight_bytes", [](const Engine& e) { return e.weights().bytes_per_token(); },
          "Weight bytes that one dense decode step reads.")
      .def_prop_ro(
          "ffn_bytes", [](const Engine& e) { return e.weights().ffn_bytes(); },
          "The part of weight_bytes that is FFN weights.")
      .def_prop_ro(
          "ffn_resident", [](const Engine& e) { return e.weights().ffn_resident; },
          "Whether dense FFN weights stay in memory, or come in a layer at a time.")
      .def(
          "ffn_down_bias",
          [](const Engine& e, int64_t layer) -> std::optional<Array<float>> {
            if (layer < 0 || layer >= e.config().n_layer) throw nb::index_error("no such layer");
            const BufferPtr& bias = e.weights().layers[static_cast<size_t>(layer)].source.down_bias;
            if (!bias) return std::nullopt;
            Array<float> copy = make_array<float>({static_cast<size_t>(e.config().n_embd)});
            e.backend().read(bias->data(), copy.data(), e.config().n_embd);
            return copy;
          },
          nb::arg("layer"), "float32 (n_embd,), or None where the architecture has none.")
      .def_prop_ro("load_seconds", &Engine::load_seconds)
      .def_prop_ro("n_vocab", [](const Engine& e) { return e.config().n_vocab; })
      .def_prop_ro("n_layer", [](const Engine& e) { return e.config().n_layer; })
      .def_prop_ro("n_ctx_train", [](const Engine& e) { return e.config().n_ctx; });

  m.def(
      "fingerprint",
      [](nb::handle file, const std::string& activation) {
        const std::shared_ptr<const GgufFile> opened = gguf_file(file);
        if (!opened) throw nb::type_error("file is no GgufFile");
        nb::gil_scoped_release release;
        return Engine::fingerprint(*opened, activation);
      },
      nb::arg("file"), nb::arg("activation") = "",
      nb::sig("def fingerprint(file: GgufFile, activation: str = '') -> int"),
      "The fingerprint of an Engine of this file and activation.");
  m.def(
      "memory",
      [] {
        const MemoryUse use = memory_use();
        nb::dict d;
        d["rss"] = use.rss;
        d["peak_rss"] = use.peak_rss;
        return d;
      },
      "Resident bytes of this process, now and at most: rss, peak_rss.");
}

}  // namespace coreinfer::python
