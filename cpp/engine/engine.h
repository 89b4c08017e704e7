// Engine: a loaded model on a backend, constant after load and shared by any number of sessions.
// Flows in: a path and where to compute. Flows out: configuration, weights, backend. It holds no
// state of any text; Session does.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "engine/memory_plan.h"
#include "engine/session_options.h"
#include "gguf/gguf_file.h"
#include "model/config.h"
#include "model/weights.h"

namespace coreinfer {

struct EngineOptions {
  CpuOptions cpu;
  int64_t n_gpu_layers = 0;   // 0: on the CPU; -1, or all of the model's and more: on a GPU; else
                              // the last so many layers on a GPU, the rest on the CPU
  int main_gpu = 0;           // which one
  uint64_t vram_limit = 0;    // bytes of its memory that may be used; 0: what is free
  uint64_t memory_limit = 0;  // bytes that this process may hold resident; 0: no limit
  // Share of the FFN weights that decoding will want beside the dense ones, for the limit: beta of
  // the core sets to come, 0 when decoding stays dense.
  double core_share = 0.0;
  // Whether the dense FFN weights must stay within the limit, too, or must not, since core weights
  // are all that will decode; nothing: they do where there is room.
  std::optional<bool> dense;
  std::string activation;  // of the feed-forward networks, by name; "": as the file says
  std::optional<SessionOptions> session;  // the one to come, for the limit; nothing: not counted
  int64_t samples = 0;                    // FFN samples that its prefills will keep
  std::function<void(float)> progress;    // of loading, in [0, 1]
};

class Engine {
 public:
  static std::shared_ptr<const Engine> load(const std::string& path, const EngineOptions& options);
  static std::shared_ptr<const Engine> load(std::shared_ptr<const GgufFile> file,
                                            const EngineOptions& options);

  const GgufFile& file() const { return *file_; }
  std::shared_ptr<const GgufFile> shared_file() const { return file_; }
  const ModelConfig& config() const { return config_; }
  const ModelWeights& weights() const { return weights_; }
  // Computing does not change the engine; the backend guards its own working memory.
  Backend& backend() const { return *backend_; }
  const MemoryPlan& memory() const { return *memory_; }
  // ||W_down[:, n]|| of each layer (n_ff), in backend memory; computed from the file when first
  // asked for.
  const std::vector<BufferPtr>& column_norms() const;
  // That of the file, and of the activation where it is not the file's: another model.
  uint64_t fingerprint() const;
  // What an engine of this file and EngineOptions::activation would have.
  static uint64_t fingerprint(const GgufFile& file, const std::string& activation);
  double load_seconds() const { return load_seconds_; }

 private:
  Engine() = default;
  static std::shared_ptr<const Engine> load(std::shared_ptr<const GgufFile> file,
                                            const EngineOptions& options, int64_t start_ns);
  std::shared_ptr<const GgufFile> file_;
  ModelConfig config_;
  std::optional<Activation> replaced_;  // by the options, another than the file's
  std::unique_ptr<const MemoryPlan> memory_;
  std::unique_ptr<Backend> backend_;
  ModelWeights weights_;  // after backend_: released first
  double load_seconds_ = 0.0;
  mutable std::once_flag norms_made_;
  mutable std::vector<BufferPtr> norms_;  // after backend_: released first
};

}  // namespace coreinfer
