// GgufFile: a GGUF model (versions 2 and 3, little endian, one file or a split set), validated and
// memory-mapped. In: a path to hostile bytes. Out: typed metadata and named weights as Mats that
// point into the mapping and live as long as the GgufFile. Constant after open and shared between
// threads. It knows no architecture: which keys and tensors a model needs is model/'s business.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/mmap_file.h"
#include "gguf/metadata.h"
#include "gguf/tensor_info.h"
#include "tensor/mat.h"

namespace coreinfer {

class GgufFile {
 public:
  // Throws kIo (cannot be read) or kGguf (malformed). A split model is opened by its first part.
  static std::shared_ptr<const GgufFile> open(const std::string& path);

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  const std::vector<std::string>& files() const { return paths_; }  // one a part
  uint64_t file_bytes() const;                                      // of all parts

  // Of the first part, which carries the model's metadata.
  const Metadata& metadata() const { return metadata_; }

  // Every tensor in file order, also those whose type cannot be computed with.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  const TensorInfo* find(std::string_view name) const;  // nullptr when absent
  bool has(std::string_view name) const { return find(name) != nullptr; }

  // The tensor with exactly this shape, ne[0] (cols) first: require("blk.0.ffn_up.weight",
  // {n_embd, n_ff}) has n_ff rows. Vectors are {n} and become one row. Throws kGguf naming file,
  // tensor, expected and found when it is absent, has another shape or an unsupported type.
  Mat require(std::string_view name, std::initializer_list<int64_t> ne) const;
  // The same, but an absent tensor is an empty Mat.
  Mat maybe(std::string_view name, std::initializer_list<int64_t> ne) const;
  // Whatever shape it has; dimensions above the first are folded into rows.
  Mat mat(const TensorInfo& info) const;

  // Throws kGguf naming the first tensor whose type no kernel here knows, and what is known.
  void require_supported_types() const;

  // Throws kIo if a part was truncated or written to since open, or lost a page under a reader.
  // About a microsecond a part; to be called before and after every call that reads weights.
  void check_unchanged() const;
  // Memory advice for a Mat of this file.
  void advise_willneed(const Mat& mat) const;
  void advise_dontneed(const Mat& mat) const;

  // A stable 64-bit name of this model for sidecar files: headers, sizes and sampled data pages.
  // It tells models apart; it is not a cryptographic hash. Computed once, on the first call.
  uint64_t fingerprint() const;

 private:
  GgufFile() = default;

  std::string path_;
  uint32_t version_ = 0;
  std::vector<std::string> paths_;
  std::vector<std::unique_ptr<MmapFile>> parts_;
  std::vector<uint64_t> header_hashes_;  // one a part, for the fingerprint
  std::vector<uint64_t> data_starts_;    // one a part, bytes
  Metadata metadata_;
  std::vector<TensorInfo> tensors_;
  std::vector<uint32_t> by_name_;  // indices into tensors_ in the order of their names
  mutable std::once_flag fingerprint_once_;
  mutable uint64_t fingerprint_ = 0;
};

}  // namespace coreinfer
