// TensorInfo: name, type, shape and place of one tensor, and the reading of a header's list of
// them. In: header bytes. Out: infos whose sizes are computed without overflow, and, once the
// alignment is known, whose bytes are known to lie inside the file and in nobody else's.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace coreinfer {

class ByteReader;

struct TensorInfo {
  std::string name;
  uint32_t type = 0;                         // GGUF id; may be one that no kernel here knows
  int n_dims = 0;                            // 1 … 4
  std::array<int64_t, 4> ne = {1, 1, 1, 1};  // GGUF order: ne[0] = cols; unused dims are 1
  uint64_t offset = 0;                       // bytes from the start of its file
  uint64_t nbytes = 0;
  int part = 0;  // index into GgufFile::files()

  std::string shape() const;  // "[576, 1536]", for messages
};

// Offsets are still those in the file: from the start of the data section.
std::vector<TensorInfo> parse_tensor_infos(ByteReader& reader, uint64_t n_tensors);

// Checks that every tensor is aligned, inside the file and apart from the others, and makes the
// offsets those from the start of the file. Returns where the data section starts.
uint64_t place_tensors(const std::string& path, std::vector<TensorInfo>& tensors,
                       uint64_t header_bytes, uint64_t alignment, uint64_t file_bytes);

}  // namespace coreinfer
