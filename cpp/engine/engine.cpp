#include "engine/engine.h"

#include "base/clock.h"
#include "base/memory_use.h"
#include "model/arch/arch.h"

namespace coreinfer {

std::shared_ptr<const Engine> Engine::load(const std::string& path, const EngineOptions& options) {
  const int64_t start = now_ns();
  std::shared_ptr<Engine> engine(new Engine());
  engine->file_ = GgufFile::open(path);
  engine->config_ = read_config(*engine->file_);
  engine->backend_ = make_cpu_backend(options.cpu);
  engine->memory_ = std::make_unique<MemoryPlan>(
      options.memory_limit, memory_use().rss, options.core_share, *engine->file_, engine->config_);
  const WeightOptions weights{engine->memory_->ffn_resident(), options.progress};
  engine->weights_ = load_weights(*engine->file_, engine->config_, *engine->backend_, weights);
  engine->load_seconds_ = seconds_since(start);
  return engine;
}

}  // namespace coreinfer
