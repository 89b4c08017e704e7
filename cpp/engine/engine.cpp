#include "engine/engine.h"

#include "backend/cuda_loader.h"
#include "base/clock.h"
#include "base/error.h"
#include "base/memory_use.h"
#include "model/arch/arch.h"

namespace coreinfer {
namespace {

std::unique_ptr<Backend> make_backend(const EngineOptions& options, int64_t n_layer) {
  const int64_t n = options.n_gpu_layers;
  if (n == 0) return make_cpu_backend(options.cpu);
  if (n < -1 || (n > 0 && n < n_layer)) {
    throw_error(ErrorKind::kValue,
                "n_gpu_layers is %lld, expected 0 (CPU) or -1 (all %lld layers on the GPU): layers "
                "cannot be split between the two; vram_limit fits a larger model onto a GPU",
                static_cast<long long>(n), static_cast<long long>(n_layer));
  }
  CudaOptions cuda;
  cuda.device = options.main_gpu;
  cuda.f32_activations = options.cpu.f32_activations;
  cuda.memory_limit = options.vram_limit;
  return make_cuda_backend(cuda);
}

}  // namespace

std::shared_ptr<const Engine> Engine::load(const std::string& path, const EngineOptions& options) {
  const int64_t start = now_ns();
  std::shared_ptr<Engine> engine(new Engine());
  engine->file_ = GgufFile::open(path);
  engine->config_ = read_config(*engine->file_);
  engine->backend_ = make_backend(options, engine->config_.n_layer);
  // A GPU has memory of its own; what the process holds on the host does not count there.
  const uint64_t device = engine->backend_->info().device_memory;
  engine->memory_ = std::make_unique<MemoryPlan>(
      device > 0 ? device : options.memory_limit, device > 0 ? 0 : memory_use().rss,
      options.core_share, *engine->file_, engine->config_);
  const WeightOptions weights{engine->memory_->ffn_resident(), options.progress};
  engine->weights_ = load_weights(*engine->file_, engine->config_, *engine->backend_, weights);
  engine->load_seconds_ = seconds_since(start);
  return engine;
}

}  // namespace coreinfer
