#include "gguf/tensor_info.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "gguf/byte_reader.h"
#include "gguf/limits.h"
#include "gguf/metadata_parser.h"
#include "tensor/dtype.h"

namespace coreinfer {
namespace {

unsigned long long ull(uint64_t n) { return n; }

// Rows times bytes of a row; sizes from a file may not overflow.
uint64_t checked_bytes(const ByteReader& reader, const TensorInfo& t) {
  const std::optional<BlockLayout> layout = gguf_block_layout(t.type);
  if (!layout) {
    reader.fail("tensor type is %u, which is not (or no longer) a type of the format", t.type);
  }
  if (t.ne[0] % layout->block_size != 0) {
    reader.fail("a row has %lld elements, expected a multiple of %d, the block of type %s",
                static_cast<long long>(t.ne[0]), layout->block_size,
                std::string(gguf_type_name(t.type)).c_str());
  }
  // Elements must fit i64 as well, since that is what loops count in.
  uint64_t elements = 1;
  for (const int64_t n : t.ne) {
    const uint64_t limit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    if (static_cast<uint64_t>(n) > limit / elements) {
      reader.fail("shape %s has more elements than 64 bits can count", t.shape().c_str());
    }
    elements *= static_cast<uint64_t>(n);
  }
  const uint64_t blocks = elements / static_cast<uint64_t>(layout->block_size);
  const uint64_t block_bytes = static_cast<uint64_t>(layout->block_bytes);
  if (blocks > std::numeric_limits<uint64_t>::max() / block_bytes) {
    reader.fail("shape %s of type %s has more bytes than 64 bits can count", t.shape().c_str(),
                std::string(gguf_type_name(t.type)).c_str());
  }
  return blocks * block_bytes;
}

[[noreturn]] void fail(const std::string& path, const TensorInfo& tensor,
                       const std::string& message) {
  throw_error(ErrorKind::kGguf, "%s: tensor '%s': %s", path.c_str(), printable(tensor.name).c_str(),
              message.c_str());
}

}  // namespace

std::string TensorInfo::shape() const {
  std::string text = "[";
  for (int i = 0; i < n_dims; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(ne[static_cast<size_t>(i)]);
  }
  return text + "]";
}

std::vector<TensorInfo> parse_tensor_infos(ByteReader& reader, uint64_t n_tensors) {
  std::vector<TensorInfo> tensors;  // grows with what is there, not with what is claimed
  for (uint64_t i = 0; i < n_tensors; ++i) {
    reader.set_item("tensor info", i);
    TensorInfo t;
    t.name = reader.string("name", gguf_limits::kTensorNameBytes);
    check_name(reader, "name", t.name);
    reader.set_name(t.name);
    const uint32_t n_dims = reader.read<uint32_t>("number of dimensions");
    if (n_dims < 1 || n_dims > t.ne.size()) {
      reader.fail("number of dimensions is %u, expected 1 to 4", n_dims);
    }
    t.n_dims = static_cast<int>(n_dims);
    for (uint32_t d = 0; d < n_dims; ++d) {
      t.ne[d] = reader.read<int64_t>("dimensions");
      if (t.ne[d] < 1) {
        reader.fail("dimension %u is %lld, expected at least 1", d,
                    static_cast<long long>(t.ne[d]));
      }
    }
    t.type = reader.read<uint32_t>("type");
    t.offset = reader.read<uint64_t>("offset");
    t.nbytes = checked_bytes(reader, t);
    tensors.push_back(std::move(t));
  }
  return tensors;
}

uint64_t place_tensors(const std::string& path, std::vector<TensorInfo>& tensors,
                       uint64_t header_bytes, uint64_t alignment, uint64_t file_bytes) {
  // Both are capped far below 2^63.
  const uint64_t start = (header_bytes + alignment - 1) / alignment * alignment;
  if (tensors.empty()) return std::min(start, file_bytes);
  if (start > file_bytes) {
    throw_error(ErrorKind::kGguf,
                "%s: tensor data starts at byte %llu, behind the end of the file of %llu bytes; it "
                "is truncated",
                path.c_str(), ull(start), ull(file_bytes));
  }
  const uint64_t data_bytes = file_bytes - start;
  std::vector<uint32_t> order(tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return tensors[a].offset < tensors[b].offset; });
  const TensorInfo* before = nullptr;
  for (const uint32_t i : order) {
    const TensorInfo& t = tensors[i];
    if (t.offset % alignment != 0) {
      fail(path, t,
           format_string("offset is %llu, expected a multiple of the alignment %llu", ull(t.offset),
                         ull(alignment)));
    }
    if (t.offset > data_bytes || t.nbytes > data_bytes - t.offset) {
      fail(path, t,
           format_string("%llu bytes expected at offset %llu of the tensor data, which has %llu "
                         "bytes; the file is truncated or its header is wrong",
                         ull(t.nbytes), ull(t.offset), ull(data_bytes)));
    }
    if (before != nullptr && t.offset < before->offset + before->nbytes) {
      fail(
          path, t,
          format_string("offset is %llu, inside tensor '%s', expected at least %llu", ull(t.offset),
                        printable(before->name).c_str(), ull(before->offset + before->nbytes)));
    }
    before = &t;
  }
  for (TensorInfo& t : tensors) t.offset += start;
  return start;
}

}  // namespace coreinfer
