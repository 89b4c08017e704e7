// Element types of weight tensors: one row of facts a type, with GGUF's own numbers and names.
// What flows in: a type id from a file. What flows out: block length, block bytes, name.
// It knows no kernel: how a type is computed with lives in kernels/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace coreinfer {

// Values are GGUF's tensor type ids.
enum class DType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kBF16 = 30,
};

struct DTypeTraits {
  DType type;
  std::string_view name;  // as GGUF writes it, "Q4_K"
  int block_size;         // elements a block; 1 for the float types
  int block_bytes;        // bytes a block
  int group_size;         // elements that share one scale: 32 or 16; 1 for the float types
  bool quantized;
};

inline constexpr std::array<DTypeTraits, 15> kDTypes = {{
    {DType::kF32, "F32", 1, 4, 1, false},
    {DType::kF16, "F16", 1, 2, 1, false},
    {DType::kBF16, "BF16", 1, 2, 1, false},
    {DType::kQ4_0, "Q4_0", 32, 18, 32, true},
    {DType::kQ4_1, "Q4_1", 32, 20, 32, true},
    {DType::kQ5_0, "Q5_0", 32, 22, 32, true},
    {DType::kQ5_1, "Q5_1", 32, 24, 32, true},
    {DType::kQ8_0, "Q8_0", 32, 34, 32, true},
    {DType::kQ2_K, "Q2_K", 256, 84, 16, true},
    {DType::kQ3_K, "Q3_K", 256, 110, 16, true},
    {DType::kQ4_K, "Q4_K", 256, 144, 32, true},
    {DType::kQ5_K, "Q5_K", 256, 176, 32, true},
    {DType::kQ6_K, "Q6_K", 256, 210, 16, true},
    {DType::kIQ4_NL, "IQ4_NL", 32, 18, 32, true},
    {DType::kIQ4_XS, "IQ4_XS", 256, 136, 32, true},
}};

// The facts of a type that this library supports; nullptr for every other id.
constexpr const DTypeTraits* find_dtype(uint32_t gguf_id) {
  for (const DTypeTraits& t : kDTypes) {
    if (static_cast<uint32_t>(t.type) == gguf_id) return &t;
  }
  return nullptr;
}

constexpr const DTypeTraits& traits(DType type) { return *find_dtype(static_cast<uint32_t>(type)); }

// Bytes of one row of n elements; n must be a multiple of the block size.
constexpr size_t row_bytes(DType type, int64_t n) {
  const DTypeTraits& t = traits(type);
  return static_cast<size_t>(n / t.block_size) * static_cast<size_t>(t.block_bytes);
}

// GGUF's name of any current id, also of types that are not supported: "IQ2_XXS"; "unknown" else.
std::string_view gguf_type_name(uint32_t gguf_id);

// Block length and bytes of any current id, so that a file with types that cannot be computed with
// can still be checked and listed; nullopt for removed and unknown ids.
struct BlockLayout {
  int block_size;
  int block_bytes;
};
std::optional<BlockLayout> gguf_block_layout(uint32_t gguf_id);

}  // namespace coreinfer
