// Keys and values in host memory, laid out for attention: each head of each layer by itself, values
// one row a position, keys in blocks of kKvBlock positions that lie element by element, so that the
// scores of a block need no sums across a vector. Address space for n_ctx positions is reserved;
// pages are committed as positions are written. It does no attention (cpu_attend.cpp does).
#pragma once

#include <vector>

#include "backend/backend.h"
#include "base/aligned_buffer.h"
#include "kernels/attention_block.h"

namespace coreinfer {

class CpuKvCache final : public KvCache {
 public:
  CpuKvCache(const KvSpec& spec, Isa isa);

  size_t committed_bytes() const override;
  size_t position_bytes() const override {
    return static_cast<size_t>(n_head_kv()) * (key_row_bytes_ + value_row_bytes_);
  }
  // Layer by layer, keys then values, head by head, one row a position; 8-bit rows are their codes,
  // then their float16 scales.
  std::vector<std::byte> save(int64_t n) const override;
  void restore(std::span<const std::byte> bytes, int64_t n) override;

  // One head's key and value at a position, head_dim elements each, converted to the cache's types.
  // Different heads and blocks may be written by different threads.
  void store_key(int64_t layer, int64_t head, int64_t position, const float* key);
  void store_value(int64_t layer, int64_t head, int64_t position, const float* value);
  // Tells that positions [0, end) of a layer hold something now.
  void mark_written(int64_t layer, int64_t end);

  // Views of the memory, which the cache owns.
  // (head_dim, kKvBlock) elements; 8-bit: codes, then scales (head_dim / kKvGroup, kKvBlock).
  std::byte* key_block(int64_t layer, int64_t head, int64_t block) const {
    return head_region(layer, head) + static_cast<size_t>(block) * key_block_bytes_;
  }
  // The row at a position: head_dim elements; 8-bit: codes, then scales (head_dim / kKvGroup).
  std::byte* value_row(int64_t layer, int64_t head, int64_t position) const {
    return head_region(layer, head) + keys_bytes_ +
           static_cast<size_t>(position) * value_row_bytes_;
  }
  size_t value_row_bytes() const { return value_row_bytes_; }
  int64_t n_head_kv() const { return spec_.row_width / spec_.head_dim; }

 private:
  std::byte* head_region(int64_t layer, int64_t head) const {
    return memory_.data() + static_cast<size_t>(layer * n_head_kv() + head) * head_bytes_;
  }
  void gather_key(const std::byte* block, int64_t column, std::byte* row) const;
  void scatter_key(std::byte* block, int64_t column, const std::byte* row) const;

  const AttentionKernels& kernels_;
  size_t key_row_bytes_ = 0;
  size_t key_block_bytes_ = 0;
  size_t value_row_bytes_ = 0;
  size_t keys_bytes_ = 0;  // of one head, whole pages
  size_t head_bytes_ = 0;  // keys and values of one head, whole pages
  Reservation memory_;
  std::vector<int64_t> written_;  // per layer: positions that ever held something
};

}  // namespace coreinfer
