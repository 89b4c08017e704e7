// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <cstring>

#include "kv_cache.h"

namespace coreinfer::cuda {
namespace {

KvElement element_of(KvType type) {
  switch (type) {
    case KvType::kF32:
      return KvElement::kF32;
    case KvType::kQ8_0:
      return KvElement::kQ8;
    case KvType::kF16:
      break;
  }
  return KvElement::kF16;
}

size_t element_bytes(KvElement element) {
  return element == KvElement::kF32 ? 4 : element == KvElement::kF16 ? 2 : 1;
}

}  // namespace

CudaKvCache::CudaKvCache(const ContextPtr& context, const KvSpec& spec) : context_(context) {
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
  if (spec.n_layer > (1 << 16) || spec.n_ctx > (int64_t{1} << 30) || spec.row_width > (1 << 20)) {
    fail("too large to address");
  }
  if (spec.row_width % spec.head_dim != 0) fail("a row must be whole heads");
  if (spec.head_dim % 8 != 0 || spec.head_dim > 256) {
    fail("on a GPU heads have a multiple of 8 elements, at most 256; compute on the CPU");
  }
  spec_ = spec;
  const KvType types[2] = {spec.type_k, spec.type_v};
  const auto n_ctx = static_cast<size_t>(spec.n_ctx), dim = static_cast<size_t>(spec.head_dim);
  for (int i = 0; i < 2; ++i) {
    const bool q8 = types[i] == KvType::kQ8_0;
    if (q8 && spec.head_dim % kKvGroup != 0) {
      fail("q8_0 needs heads of a multiple of 32 elements; use f16");
    }
    row_bytes_[i] = dim * element_bytes(element_of(types[i]));
    scale_bytes_[i] = q8 ? dim / kKvGroup * 2 : 0;
    head_bytes_[i] = (n_ctx * (row_bytes_[i] + scale_bytes_[i]) + 255) / 256 * 256;
    side_bytes_[i] = head_bytes_[i] * static_cast<size_t>(spec.row_width / spec.head_dim);
  }
  memory_ = Memory(context, (side_bytes_[0] + side_bytes_[1]) * static_cast<size_t>(spec.n_layer),
                   "KV cache");
}

KvPlane CudaKvCache::plane(int64_t layer, int64_t side) const {
  const size_t start =
      static_cast<size_t>(layer) * (side_bytes_[0] + side_bytes_[1]) + (side ? side_bytes_[0] : 0);
  return {memory_.as<unsigned char>() + start, static_cast<int64_t>(head_bytes_[side]),
          static_cast<int64_t>(row_bytes_[side]) * spec_.n_ctx,
          element_of(side ? spec_.type_v : spec_.type_k), 0};
}

size_t CudaKvCache::position_bytes() const {
  const auto heads = static_cast<size_t>(spec_.row_width / spec_.head_dim);
  return heads * (row_bytes_[0] + scale_bytes_[0] + row_bytes_[1] + scale_bytes_[1]);
}

// move(device rows, device scales or null, side), for every head.
template <typename Move>
void CudaKvCache::each_row_plane(int64_t n, const Move& move) const {
  if (n < 0 || n > spec_.n_ctx) {
    throw_error(ErrorKind::kValue, "%lld positions of a KV cache of %lld",
                static_cast<long long>(n), static_cast<long long>(spec_.n_ctx));
  }
  for (int64_t layer = 0; layer < spec_.n_layer; ++layer) {
    for (int side = 0; side < 2; ++side) {
      const KvPlane p = plane(layer, side);
      for (int64_t head = 0; head < spec_.row_width / spec_.head_dim; ++head) {
        unsigned char* rows = p.data + head * p.head_stride;
        move(rows, rows + p.scales_start, side);
      }
    }
  }
}

std::vector<std::byte> CudaKvCache::save(int64_t n) const {
  const Context::Lock lock(*context_);
  std::vector<std::byte> out;
  const auto count = static_cast<size_t>(n);
  std::vector<std::byte> rows, scales;
  each_row_plane(n, [&](const unsigned char* at, const unsigned char* at_scales, int side) {
    const size_t row = row_bytes_[side], scale = scale_bytes_[side];
    rows.resize(count * row);
    scales.resize(count * scale);
    context_->copy_out(rows.data(), at, rows.size());
    if (scale > 0) context_->copy_out(scales.data(), at_scales, scales.size());
    for (size_t i = 0; i < count; ++i) {
      out.insert(out.end(), rows.data() + i * row, rows.data() + (i + 1) * row);
      out.insert(out.end(), scales.data() + i * scale, scales.data() + (i + 1) * scale);
    }
  });
  return out;
}

void CudaKvCache::restore(std::span<const std::byte> bytes, int64_t n) {
  const auto count = static_cast<size_t>(n);
  const size_t expected = static_cast<size_t>(spec_.n_layer) * count * position_bytes();
  if (bytes.size() != expected) {
    throw_error(ErrorKind::kValue, "%zu bytes for %lld positions of a KV cache, expected %zu",
                bytes.size(), static_cast<long long>(n), expected);
  }
  const Context::Lock lock(*context_);
  std::vector<std::byte> rows, scales;
  size_t at = 0;
  each_row_plane(n, [&](unsigned char* to, unsigned char* to_scales, int side) {
    const size_t row = row_bytes_[side], scale = scale_bytes_[side];
    rows.resize(count * row);
    scales.resize(count * scale);
    for (size_t i = 0; i < count; ++i, at += row + scale) {
      std::memcpy(rows.data() + i * row, bytes.data() + at, row);
      if (scale > 0) std::memcpy(scales.data() + i * scale, bytes.data() + at + row, scale);
    }
    context_->copy_in(to, rows.data(), rows.size());
    if (scale > 0) context_->copy_in(to_scales, scales.data(), scales.size());
  });
}

}  // namespace coreinfer::cuda
