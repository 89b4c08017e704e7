// Caps on what a header may claim, each far above anything real and small enough that a hostile
// file costs little. They come on top of the rule that nothing may be larger than the bytes left.
#pragma once

#include <cstdint>

namespace coreinfer::gguf_limits {

// Real files have below 100 keys; every key costs a record and an index entry.
inline constexpr uint64_t kMetadataEntries = uint64_t{1} << 16;
// The largest models have some ten thousand tensors, over all parts of a split set.
inline constexpr uint64_t kTensors = uint64_t{1} << 18;
// The format's own limit on keys.
inline constexpr uint64_t kKeyBytes = 65535;
// The usual implementation's limit on tensor names (64 with the terminating zero).
inline constexpr uint64_t kTensorNameBytes = 63;
// The longest real strings are chat templates, below 100 kB.
inline constexpr uint64_t kStringBytes = uint64_t{64} << 20;
// The longest real arrays are merge lists, below a million.
inline constexpr uint64_t kArrayElements = uint64_t{1} << 26;
// The header is copied to memory; the largest real ones (vocabulary and merges) are near 20 MB.
inline constexpr uint64_t kHeaderBytes = uint64_t{512} << 20;
// A multiple of the page size is the most that makes sense; kernels count on at least 8.
inline constexpr uint64_t kMinAlignment = 8;
inline constexpr uint64_t kMaxAlignment = uint64_t{1} << 20;
inline constexpr uint64_t kDefaultAlignment = 32;
// Each part is a descriptor and a mapping; the name's five digits would allow 99999.
inline constexpr uint64_t kParts = 1000;

}  // namespace coreinfer::gguf_limits
