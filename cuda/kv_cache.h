// Keys and values in device memory, one row a position, each head of each layer by itself: first a
// plane of elements (n_ctx, head_dim), then for q8_0 a plane of float16 scales, one for 32
// elements. Memory for n_ctx positions is taken when the cache is made. The kernels of attention.h
// read and write it.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "backend/backend.h"
#include "context.h"

namespace coreinfer::cuda {

inline constexpr int kKvGroup = 32;  // elements that share a scale

enum class KvElement : int32_t { kF16, kF32, kQ8 };

// Keys or values of one layer, all heads.
struct KvPlane {
  unsigned char* data;
  int64_t head_stride;   // bytes from one head to the next
  int64_t scales_start;  // bytes from a head's elements to its scales
  KvElement element;
  int32_t unused;
};

class CudaKvCache final : public KvCache {
 public:
  CudaKvCache(const ContextPtr& context, const KvSpec& spec);

  size_t committed_bytes() const override { return memory_.size(); }
  size_t position_bytes() const override;
  // As the CPU writes it: layer by layer, keys then values, head by head, a row a position; 8-bit
  // rows are their codes, then their scales.
  std::vector<std::byte> save(int64_t n) const override;
  void restore(std::span<const std::byte> bytes, int64_t n) override;

  KvPlane keys(int64_t layer) const { return plane(layer, 0); }
  KvPlane values(int64_t layer) const { return plane(layer, 1); }

 private:
  KvPlane plane(int64_t layer, int64_t side) const;
  template <typename Move>
  void each_row_plane(int64_t n, const Move& move) const;

  ContextPtr context_;
  Memory memory_;
  size_t head_bytes_[2] = {};   // of keys, of values
  size_t side_bytes_[2] = {};   // of all heads
  size_t row_bytes_[2] = {};    // of elements, without scales
  size_t scale_bytes_[2] = {};  // of a row
};

}  // namespace coreinfer::cuda
