// ModelWeights: every tensor of a model, asked for by name with the shape that the configuration
// implies, and brought into the backend's layout. Flows in: GgufFile, ModelConfig, Backend. Flows
// out: what forward/ computes with, and the file's own matrices for compaction to read. Dense FFN
// weights are resident, or brought in a layer at a time when memory is short (stage_ffn).
#pragma once

#include <functional>
#include <vector>

#include "backend/backend.h"
#include "gguf/gguf_file.h"
#include "model/config.h"

namespace coreinfer {

struct LayerWeights {
  Norm attn_norm;                            // no weight: none
  WeightPtr q;                               // (n_head * head_dim, n_embd)
  WeightPtr k;                               // (n_head_kv * head_dim, n_embd)
  WeightPtr v;                               // (n_head_kv * head_dim, n_embd)
  WeightPtr o;                               // (n_embd, n_head * head_dim)
  Norm q_norm, k_norm;                       // over all heads; no weight: none
  BufferPtr q_bias, k_bias, v_bias, o_bias;  // null where the model has none
  AttentionSpec attention;       // with the norms of single heads and rope of this layer
  AttentionSpec attention_long;  // the same for contexts that take rope_freq_long
  Norm attn_post_norm;           // no weight: none
  Norm ffn_norm;                 // no weight: none
  FfnWeights ffn;                // empty where dense FFN weights are not resident
  Norm ffn_post_norm;
  CompactSource source;  // the same FFN in the mapped file; `neurons` empty
};

struct ModelWeights {
  Mat token_embd;     // (n_vocab, n_embd), in the mapped file
  Mat position_embd;  // (n_ctx + offset, n_embd) or empty
  Norm output_norm;
  WeightPtr output;  // (n_vocab, n_embd); the embeddings again where the head is tied
  std::vector<LayerWeights> layers;
  bool ffn_resident = true;
  bool memory_limited = false;

  // Weight bytes that one dense decode step reads, and the part that is FFN weights.
  size_t bytes_per_token() const;
  size_t ffn_bytes() const;

  // The dense FFN of a layer: the resident one, or a copy made from the file now, whose memory goes
  // when the returned value does. Its pages in the file do not stay.
  FfnWeights stage_ffn(size_t layer) const;
  // Mapped pages that compaction or an embedding has read need not stay resident. Where they may,
  // the next core set is gathered without faults: each costs as much as the gathering from its
  // page.
  void drop_ffn_pages(size_t layer) const;
  void drop_embedding_pages() const;
  // So many rows of embeddings make at most so many bytes of the file resident: Linux maps 64 KiB
  // around a page that is asked for, and a row may lie in two such pieces.
  static constexpr int64_t kEmbeddingRows = 64;
  static constexpr uint64_t kEmbeddingBytes = kEmbeddingRows * 2 * (uint64_t{64} << 10);

  const GgufFile* file = nullptr;  // not an owner
  Backend* backend = nullptr;      // not an owner
};

struct WeightOptions {
  bool ffn_resident = true;
  bool memory_limited = false;          // resident pages count, those of the mapped file too
  std::function<void(float)> progress;  // gets [0, 1]
};

// Rows of the matrices that a tensor of the file is loaded as, which are several where it is fused.
std::vector<int64_t> rows_of_matrices(const TensorInfo& info, const ModelConfig& config);

// Throws kGguf for a missing, misshapen, unsupported or unexpected tensor.
ModelWeights load_weights(const GgufFile& file, const ModelConfig& config, Backend& backend,
                          const WeightOptions& options);

}  // namespace coreinfer
