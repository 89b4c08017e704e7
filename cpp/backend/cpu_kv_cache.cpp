#include "backend/cpu_kv_cache.h"

#include <algorithm>
#include <cstring>

namespace coreinfer {
namespace {

constexpr size_t kPage = 4096;
constexpr int64_t kMaxHeadDim = 4096;
constexpr double kMaxBytes = 0x1p46;  // half of what a process can map on common machines

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

size_t head_row_bytes(KvType type, int64_t head_dim) {
  const auto n = static_cast<size_t>(head_dim);
  switch (type) {
    case KvType::kF32:
      return n * sizeof(float);
    case KvType::kF16:
      return n * sizeof(uint16_t);
    case KvType::kQ8_0:
      return n + n / kKvGroup * sizeof(uint16_t);
  }
  throw_error(ErrorKind::kValue, "KV type %d is unknown", static_cast<int>(type));
}

void check(const KvSpec& spec) {
  const auto fail = [&](const char* what) {
    throw_error(ErrorKind::kValue,
                "KV cache of %lld layers, %lld positions, rows of %lld, heads of %lld: %s",
                static_cast<long long>(spec.n_layer), static_cast<long long>(spec.n_ctx),
                static_cast<long long>(spec.row_width), static_cast<long long>(spec.head_dim),
                what);
  };
  if (spec.n_layer < 1 || spec.n_ctx < 1 || spec.row_width < 1 || spec.head_dim < 1) {
    fail("all must be positive");
  }
  if (spec.head_dim > kMaxHeadDim || spec.n_layer > (1 << 16) || spec.n_ctx > (int64_t{1} << 30) ||
      spec.row_width > (1 << 20)) {
    fail("too large to address");
  }
  if (spec.row_width % spec.head_dim != 0) fail("a row must be whole heads");
  if ((spec.type_k == KvType::kQ8_0 || spec.type_v == KvType::kQ8_0) &&
      spec.head_dim % kKvGroup != 0) {
    fail("q8_0 needs heads of a multiple of 32 elements; use f16");
  }
}

// Row <-> column of a block that lies element by element.
template <typename T>
void to_column(const std::byte* row, int64_t n, std::byte* block, int64_t column) {
  T value;
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(&value, row + static_cast<size_t>(i) * sizeof(T), sizeof(T));
    std::memcpy(block + static_cast<size_t>(i * kKvBlock + column) * sizeof(T), &value, sizeof(T));
  }
}

template <typename T>
void from_column(const std::byte* block, int64_t column, int64_t n, std::byte* row) {
  T value;
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(&value, block + static_cast<size_t>(i * kKvBlock + column) * sizeof(T), sizeof(T));
    std::memcpy(row + static_cast<size_t>(i) * sizeof(T), &value, sizeof(T));
  }
}

}  // namespace

CpuKvCache::CpuKvCache(const KvSpec& spec, Isa isa) : kernels_(attention_kernels(isa)) {
  check(spec);
  spec_ = spec;
  key_row_bytes_ = head_row_bytes(spec.type_k, spec.head_dim);
  key_block_bytes_ = key_row_bytes_ * kKvBlock;
  value_row_bytes_ = head_row_bytes(spec.type_v, spec.head_dim);
  const auto blocks = static_cast<size_t>((spec.n_ctx + kKvBlock - 1) / kKvBlock);
  keys_bytes_ = whole_pages(blocks * key_block_bytes_);
  // Whole blocks of values too: attention may look past the last position of a block.
  head_bytes_ = keys_bytes_ + whole_pages(blocks * kKvBlock * value_row_bytes_);
  const auto heads = static_cast<size_t>(spec.n_layer * n_head_kv());
  if (static_cast<double>(heads) * static_cast<double>(head_bytes_) > kMaxBytes) {
    throw_error(ErrorKind::kMemory, "a KV cache of %lld positions cannot be addressed; lower n_ctx",
                static_cast<long long>(spec.n_ctx));
  }
  memory_ = Reservation(heads * head_bytes_);
  written_.assign(static_cast<size_t>(spec.n_layer), 0);
}

size_t CpuKvCache::committed_bytes() const {
  size_t bytes = 0;
  for (const int64_t n : written_) {
    const auto blocks = static_cast<size_t>((n + kKvBlock - 1) / kKvBlock);
    bytes +=
        static_cast<size_t>(n_head_kv()) * (whole_pages(blocks * key_block_bytes_) +
                                            whole_pages(static_cast<size_t>(n) * value_row_bytes_));
  }
  return bytes;
}

void CpuKvCache::mark_written(int64_t layer, int64_t end) {
  int64_t& n = written_[static_cast<size_t>(layer)];
  n = std::max(n, end);
}

void CpuKvCache::scatter_key(std::byte* block, int64_t column, const std::byte* row) const {
  const int64_t n = spec_.head_dim;
  switch (spec_.type_k) {
    case KvType::kF32:
      return to_column<float>(row, n, block, column);
    case KvType::kF16:
      return to_column<uint16_t>(row, n, block, column);
    case KvType::kQ8_0:
      to_column<int8_t>(row, n, block, column);
      return to_column<uint16_t>(row + n, n / kKvGroup, block + n * kKvBlock, column);
  }
}

void CpuKvCache::gather_key(const std::byte* block, int64_t column, std::byte* row) const {
  const int64_t n = spec_.head_dim;
  switch (spec_.type_k) {
    case KvType::kF32:
      return from_column<float>(block, column, n, row);
    case KvType::kF16:
      return from_column<uint16_t>(block, column, n, row);
    case KvType::kQ8_0:
      from_column<int8_t>(block, column, n, row);
      return from_column<uint16_t>(block + n * kKvBlock, column, n / kKvGroup, row + n);
  }
}

namespace {

// head_dim float32 -> a row of the cache's type.
void pack_row(const AttentionKernels& kernels, KvType type, const float* x, int64_t n,
              std::byte* row) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(row, x, static_cast<size_t>(n) * sizeof(float));
      return;
    case KvType::kF16:
      return kernels.f32_to_f16(x, n, reinterpret_cast<uint16_t*>(row));
    case KvType::kQ8_0:
      return kernels.quantize(x, n, reinterpret_cast<int8_t*>(row),
                              reinterpret_cast<uint16_t*>(row + n));
  }
}

}  // namespace

void CpuKvCache::store_key(int64_t layer, int64_t head, int64_t position, const float* key) {
  alignas(kCacheLine) std::byte row[kMaxHeadDim * sizeof(float)];
  pack_row(kernels_, spec_.type_k, key, spec_.head_dim, row);
  scatter_key(key_block(layer, head, position / kKvBlock), position % kKvBlock, row);
}

void CpuKvCache::store_value(int64_t layer, int64_t head, int64_t position, const float* value) {
  pack_row(kernels_, spec_.type_v, value, spec_.head_dim, value_row(layer, head, position));
}

std::vector<std::byte> CpuKvCache::save(int64_t n) const {
  if (n < 0 || n > spec_.n_ctx) {
    throw_error(ErrorKind::kValue, "%lld KV positions to save, expected 0 to n_ctx (%lld)",
                static_cast<long long>(n), static_cast<long long>(spec_.n_ctx));
  }
  const auto rows = static_cast<size_t>(n);
  std::vector<std::byte> bytes(static_cast<size_t>(spec_.n_layer) * rows * position_bytes());
  std::byte* out = bytes.data();
  for (int64_t layer = 0; layer < spec_.n_layer; ++layer) {
    for (int64_t head = 0; head < n_head_kv(); ++head) {
      for (int64_t p = 0; p < n; ++p, out += key_row_bytes_) {
        gather_key(key_block(layer, head, p / kKvBlock), p % kKvBlock, out);
      }
    }
    for (int64_t head = 0; head < n_head_kv(); ++head, out += rows * value_row_bytes_) {
      if (n > 0) std::memcpy(out, value_row(layer, head, 0), rows * value_row_bytes_);
    }
  }
  return bytes;
}

void CpuKvCache::restore(std::span<const std::byte> bytes, int64_t n) {
  const auto rows = static_cast<size_t>(n);
  if (n < 0 || n > spec_.n_ctx) {
    throw_error(ErrorKind::kValue, "%lld KV positions to restore, expected 0 to n_ctx (%lld)",
                static_cast<long long>(n), static_cast<long long>(spec_.n_ctx));
  }
  const size_t expected = static_cast<size_t>(spec_.n_layer) * rows * position_bytes();
  if (bytes.size() != expected) {
    throw_error(ErrorKind::kValue,
                "saved KV state of %zu bytes, expected %zu for %lld positions; it was saved from "
                "another model or other KV types",
                bytes.size(), expected, static_cast<long long>(n));
  }
  const std::byte* in = bytes.data();
  for (int64_t layer = 0; layer < spec_.n_layer; ++layer) {
    for (int64_t head = 0; head < n_head_kv(); ++head) {
      for (int64_t p = 0; p < n; ++p, in += key_row_bytes_) {
        scatter_key(key_block(layer, head, p / kKvBlock), p % kKvBlock, in);
      }
    }
    for (int64_t head = 0; head < n_head_kv(); ++head, in += rows * value_row_bytes_) {
      if (n == 0) continue;
      std::memcpy(value_row(layer, head, 0), in, rows * value_row_bytes_);
    }
    mark_written(layer, n);
  }
}

}  // namespace coreinfer
