#include "engine/engine.h"

#include <cstdio>

#include "backend/cuda_loader.h"
#include "backend/split_backend.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/memory_use.h"
#include "gguf/fingerprint.h"
#include "model/activation.h"
#include "model/arch/arch.h"
#include "neurons/column_norms.h"
#include "neurons/ffn_samples.h"

namespace coreinfer {
namespace {

// The last n layers, as llama.cpp splits a model.
GpuPart last_layers(const GgufFile& file, int64_t n_layer, int64_t n) {
  GpuPart part;
  part.first_layer = n_layer - n;
  for (const TensorInfo& info : file.tensors()) {
    long long layer = -1;
    if (std::sscanf(info.name.c_str(), "blk.%lld.", &layer) == 1 && layer >= part.first_layer) {
      const Mat mat = file.mat(info);
      part.tensors.emplace(mat.data, mat.data + mat.bytes());
    }
  }
  return part;
}

// A GPU has memory of its own; what the process holds on the host does not count there.
MemoryBudget gpu_budget(const EngineOptions& options, const BackendInfo& info) {
  MemoryBudget budget;
  budget.limit = info.device_memory + info.device_own;
  budget.process = info.device_own;
  budget.file_pages = false;
  budget.core_share = options.core_share;
  budget.dense = options.dense;
  budget.name = options.vram_limit > 0 ? "vram_limit" : "the GPU's free memory";
  return budget;
}

std::unique_ptr<Backend> make_backend(const EngineOptions& options, const GgufFile& file,
                                      const ModelConfig& config, const SessionMemory& session) {
  const int64_t n = options.n_gpu_layers, n_layer = config.n_layer;
  if (n < -1) {
    throw_error(ErrorKind::kValue,
                "n_gpu_layers is %lld, expected 0 (CPU), a number of layers, or -1 (all %lld)",
                static_cast<long long>(n), static_cast<long long>(n_layer));
  }
  CpuOptions cpu = options.cpu;
  cpu.memory_limited = options.memory_limit > 0;
  if (n == 0) return make_cpu_backend(cpu);
  CudaOptions cuda;
  cuda.device = options.main_gpu;
  cuda.f32_activations = options.cpu.f32_activations;
  cuda.memory_limit = options.vram_limit;
  std::unique_ptr<Backend> gpu = make_cuda_backend(cuda);
  if (n < 0 || n >= n_layer) return gpu;
  MemoryBudget budget = gpu_budget(options, gpu->info());
  budget.first_layer = n_layer - n;
  budget.session = session;
  budget.session.cache = session.cache / static_cast<uint64_t>(n_layer) * static_cast<uint64_t>(n);
  budget.session.counts = 0;  // on the host
  budget.dense.reset();       // what is there stays there
  if (options.memory_limit == 0) {
    MemoryPlan(budget, file, config, *gpu)
        .check_resident(
            "the layers that n_gpu_layers puts there: lower n_gpu_layers, or let all "
            "layers pass through the GPU with n_gpu_layers=-1");
  }
  return make_split_backend(make_cpu_backend(cpu), std::move(gpu), last_layers(file, n_layer, n));
}

// The activation of that name; nothing where it is the configuration's own, or the name is empty.
std::optional<Activation> other_activation(const ModelConfig& config, const std::string& name) {
  if (name.empty()) return std::nullopt;
  std::string expected;
  const std::optional<Activation> activation = activation_for(name, config.gated, &expected);
  if (!activation) {
    throw_error(ErrorKind::kValue, "activation is '%s', expected one of %s", name.c_str(),
                expected.c_str());
  }
  if (*activation == config.activation) return std::nullopt;
  return activation;
}

uint64_t fingerprint_of(const GgufFile& file, const std::optional<Activation>& replaced) {
  if (!replaced) return file.fingerprint();
  const std::string name = activation_name(*replaced);
  return hash_bytes(std::as_bytes(std::span(name)), file.fingerprint());
}

}  // namespace

std::shared_ptr<const Engine> Engine::load(const std::string& path, const EngineOptions& options) {
  const int64_t start = now_ns();
  return load(GgufFile::open(path), options, start);
}

std::shared_ptr<const Engine> Engine::load(std::shared_ptr<const GgufFile> file,
                                           const EngineOptions& options) {
  return load(std::move(file), options, now_ns());
}

std::shared_ptr<const Engine> Engine::load(std::shared_ptr<const GgufFile> file,
                                           const EngineOptions& options, int64_t start_ns) {
  std::shared_ptr<Engine> engine(new Engine());
  engine->file_ = std::move(file);
  engine->config_ = read_config(*engine->file_);
  engine->replaced_ = other_activation(engine->config_, options.activation);
  if (engine->replaced_) engine->config_.activation = *engine->replaced_;
  const ModelConfig& config = engine->config_;
  SessionMemory session;
  if (options.session) {
    session = session_memory(checked(*options.session, config), config);
    session.counts +=
        FfnSamples::bytes(options.samples, config.n_layer, config.n_ff, config.n_embd);
  }
  engine->backend_ = make_backend(options, *engine->file_, config, session);
  const BackendInfo info = engine->backend_->info();
  const bool on_gpu = info.device_memory > 0;
  MemoryBudget budget;
  if (on_gpu) {
    budget = gpu_budget(options, info);
  } else {
    budget.limit = options.memory_limit;
    budget.process = memory_use().rss;
    budget.core_share = options.core_share;
    budget.dense = options.dense;
  }
  budget.session = session;
  engine->memory_ = std::make_unique<MemoryPlan>(budget, *engine->file_, config, *engine->backend_);
  const WeightOptions weights{engine->memory_->ffn_resident(),
                              !on_gpu && engine->memory_->limited(), options.progress};
  engine->weights_ = load_weights(*engine->file_, engine->config_, *engine->backend_, weights);
  engine->load_seconds_ = seconds_since(start_ns);
  return engine;
}

uint64_t Engine::fingerprint() const { return fingerprint_of(*file_, replaced_); }

uint64_t Engine::fingerprint(const GgufFile& file, const std::string& activation) {
  if (activation.empty()) return file.fingerprint();
  return fingerprint_of(file, other_activation(read_config(file), activation));
}

const std::vector<BufferPtr>& Engine::column_norms() const {
  std::call_once(norms_made_, [this] {
    file_->check_unchanged();
    std::vector<BufferPtr> norms;
    for (size_t i = 0; i < weights_.layers.size(); ++i) {
      const std::vector<float> layer = coreinfer::column_norms(weights_.layers[i].source.down);
      if (!weights_.ffn_resident) weights_.drop_ffn_pages(i);
      norms.push_back(backend_->allocate(config_.n_ff));
      backend_->write(layer.data(), norms.back()->data(), config_.n_ff);
    }
    file_->check_unchanged();
    norms_ = std::move(norms);
  });
  return norms_;
}

}  // namespace coreinfer
