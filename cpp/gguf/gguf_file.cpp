#include "gguf/gguf_file.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "base/error.h"
#include "gguf/byte_reader.h"
#include "gguf/fingerprint.h"
#include "gguf/limits.h"
#include "gguf/metadata_parser.h"
#include "gguf/split.h"

namespace coreinfer {
namespace {

constexpr uint32_t kMagic = 0x46554747;            // "GGUF", little endian
constexpr uint32_t kPowerInferMagic = 0x49525750;  // "PWRI"
constexpr const char* kSplitNo = "split.no";
constexpr const char* kSplitCount = "split.count";
constexpr const char* kSplitTensors = "split.tensors.count";

// The least that a tensor takes in a header: length and one byte of its name, number of dimensions,
// one dimension, type, offset.
constexpr uint64_t kMinInfoBytes = 8 + 1 + 4 + 8 + 4 + 8;

unsigned long long ull(uint64_t n) { return n; }

// What one file holds.
struct Part {
  std::unique_ptr<MmapFile> file;
  uint32_t version = 0;
  Metadata metadata;
  std::vector<TensorInfo> tensors;
  uint64_t data_start = 0;
};

struct Header {
  uint32_t version;
  uint64_t n_tensors, n_kv;
};

Header read_header(ByteReader& reader) {
  const uint32_t magic = reader.read<uint32_t>("magic");
  if (magic == kPowerInferMagic) {
    reader.fail(
        "a file for PowerInfer, which is not supported; expected a GGUF file: convert the "
        "original model with tools/convert_hf_to_gguf.py");
  }
  if (magic != kMagic) {
    const std::string_view found(reinterpret_cast<const char*>(&magic), 4);
    reader.fail("not a GGUF file: expected it to start with 'GGUF', found '%s'",
                printable(found).c_str());
  }
  const uint32_t version = reader.read<uint32_t>("version");
  if (version != 0 && (version & 0xffffu) == 0) {
    reader.fail("version is 0x%08x: a big-endian file, expected little endian; convert it again",
                version);
  }
  if (version != 2 && version != 3) {
    reader.fail("version is %u, expected 2 or 3%s", version,
                version == 1 ? "; convert the model again" : "");
  }
  const uint64_t n_tensors = reader.read<uint64_t>("n_tensors");
  const uint64_t n_kv = reader.read<uint64_t>("n_kv");
  if (n_tensors > gguf_limits::kTensors) {
    reader.fail("n_tensors is %llu, at most %llu are allowed", ull(n_tensors),
                ull(gguf_limits::kTensors));
  }
  if (n_tensors > reader.remaining() / kMinInfoBytes) {
    reader.fail("n_tensors is %llu, which cannot fit in the %llu bytes left", ull(n_tensors),
                ull(reader.remaining()));
  }
  return {version, n_tensors, n_kv};
}

uint64_t alignment_of(const std::string& path, const Metadata& metadata) {
  const std::optional<MetadataEntry> entry = metadata.find("general.alignment");
  if (!entry) return gguf_limits::kDefaultAlignment;
  if (entry->type != ValueType::kU32) {
    throw_error(ErrorKind::kGguf, "%s: metadata key 'general.alignment': expected u32, found %s",
                path.c_str(), std::string(value_type_name(entry->type)).c_str());
  }
  const uint64_t alignment = metadata.u32("general.alignment");
  if (alignment < gguf_limits::kMinAlignment || alignment > gguf_limits::kMaxAlignment ||
      (alignment & (alignment - 1)) != 0) {
    throw_error(ErrorKind::kGguf,
                "%s: metadata key 'general.alignment': expected a power of two from %llu to %llu, "
                "found %llu",
                path.c_str(), ull(gguf_limits::kMinAlignment), ull(gguf_limits::kMaxAlignment),
                ull(alignment));
  }
  return alignment;
}

Part read_part(const std::string& path) {
  Part part;
  part.file = std::make_unique<MmapFile>(path);
  ByteReader reader(*part.file);
  const Header header = read_header(reader);
  part.version = header.version;
  MetadataParser parser;
  parser.parse(reader, header.n_kv);
  part.tensors = parse_tensor_infos(reader, header.n_tensors);
  const uint64_t header_bytes = reader.position();
  part.metadata = parser.finish(reader);
  part.data_start = place_tensors(path, part.tensors, header_bytes,
                                  alignment_of(path, part.metadata), part.file->size());
  return part;
}

// Which parts the model has, going by what the first file says about itself.
struct SplitPlan {
  int count = 1;
  std::optional<uint32_t> n_tensors;  // of all parts together
  SplitName name;
};

SplitPlan plan_split(const std::string& path, const Metadata& first) {
  SplitPlan plan;
  const std::optional<uint32_t> count = first.maybe_u32(kSplitCount);
  if (!count || *count <= 1) return plan;
  if (*count > gguf_limits::kParts) {
    throw_error(ErrorKind::kGguf, "%s: metadata key '%s' is %u, at most %llu parts are allowed",
                path.c_str(), kSplitCount, *count, ull(gguf_limits::kParts));
  }
  const std::optional<SplitName> name = parse_split_name(path);
  if (!name || name->count != static_cast<int>(*count)) {
    throw_error(ErrorKind::kGguf,
                "%s: one of %u parts by its metadata key '%s', expected a file name that ends in "
                "-00001-of-%05u.gguf",
                path.c_str(), *count, kSplitCount, *count);
  }
  const uint32_t number = first.u32(kSplitNo);
  if (number != static_cast<uint32_t>(name->number - 1)) {
    throw_error(ErrorKind::kGguf,
                "%s: metadata key '%s' is %u, expected %d by the name of the file", path.c_str(),
                kSplitNo, number, name->number - 1);
  }
  if (number != 0) {
    throw_error(ErrorKind::kGguf, "%s: part %u of %u; open the first, %s", path.c_str(), number + 1,
                *count, name->path(1).c_str());
  }
  plan.count = static_cast<int>(*count);
  plan.n_tensors = first.u32(kSplitTensors);
  plan.name = *name;
  return plan;
}

Part read_later_part(const SplitPlan& plan, int index, uint32_t version) {
  const std::string path = plan.name.path(index + 1);
  std::optional<Part> part;
  try {
    part = read_part(path);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kIo) throw;
    throw_error(ErrorKind::kIo, "part %d of %d cannot be read: %s", index + 1, plan.count,
                error.what());
  }
  const auto expect = [&](const char* key, uint32_t expected) {
    const uint32_t found = part->metadata.u32(key);
    if (found != expected) {
      throw_error(ErrorKind::kGguf,
                  "%s: metadata key '%s' is %u, expected %u; the parts are not of one model",
                  path.c_str(), key, found, expected);
    }
  };
  expect(kSplitNo, static_cast<uint32_t>(index));
  expect(kSplitCount, static_cast<uint32_t>(plan.count));
  expect(kSplitTensors, *plan.n_tensors);
  if (part->version != version) {
    throw_error(ErrorKind::kGguf, "%s: version is %u, expected %u as in the first part",
                path.c_str(), part->version, version);
  }
  return std::move(*part);
}

}  // namespace

// ---- Opening ------------------------------------------------------------------------------------

std::shared_ptr<const GgufFile> GgufFile::open(const std::string& path) {
  std::shared_ptr<GgufFile> file(new GgufFile);
  file->path_ = path;
  Part first = read_part(path);
  const SplitPlan plan = plan_split(path, first.metadata);
  file->version_ = first.version;

  for (int i = 0; i < plan.count; ++i) {
    Part part = i == 0 ? std::move(first) : read_later_part(plan, i, file->version_);
    for (TensorInfo& t : part.tensors) {
      t.part = i;
      file->tensors_.push_back(std::move(t));
    }
    if (file->tensors_.size() > gguf_limits::kTensors) {
      throw_error(ErrorKind::kGguf, "%s: more than %llu tensors in parts 1 to %d, expected %u",
                  path.c_str(), ull(gguf_limits::kTensors), i + 1, *plan.n_tensors);
    }
    file->header_hashes_.push_back(hash_bytes(part.metadata.header(), 0));
    file->data_starts_.push_back(part.data_start);
    file->paths_.push_back(part.file->path());
    file->parts_.push_back(std::move(part.file));
    if (i == 0) file->metadata_ = std::move(part.metadata);
  }
  if (plan.n_tensors && *plan.n_tensors != file->tensors_.size()) {
    throw_error(ErrorKind::kGguf, "%s: metadata key '%s' is %u, found %zu tensors in %d parts",
                path.c_str(), kSplitTensors, *plan.n_tensors, file->tensors_.size(), plan.count);
  }

  const std::vector<TensorInfo>& tensors = file->tensors_;
  std::vector<uint32_t>& order = file->by_name_;
  order.resize(tensors.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return tensors[a].name < tensors[b].name; });
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& t = tensors[order[i]];
    if (t.name == tensors[order[i - 1]].name) {
      throw_error(ErrorKind::kGguf, "%s: tensor '%s' is there twice, expected once",
                  file->paths_[static_cast<size_t>(t.part)].c_str(), printable(t.name).c_str());
    }
  }
  return file;
}

uint64_t GgufFile::file_bytes() const {
  uint64_t bytes = 0;
  for (const auto& part : parts_) bytes += part->size();
  return bytes;
}

// ---- Tensors ------------------------------------------------------------------------------------

const TensorInfo* GgufFile::find(std::string_view name) const {
  const auto it = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [&](uint32_t i, std::string_view wanted) { return tensors_[i].name < wanted; });
  if (it == by_name_.end() || tensors_[*it].name != name) return nullptr;
  return &tensors_[*it];
}

Mat GgufFile::mat(const TensorInfo& info) const {
  const DTypeTraits* type = find_dtype(info.type);
  if (type == nullptr) {
    std::string supported;
    for (const DTypeTraits& t : kDTypes) supported += " " + std::string(t.name);
    throw_error(ErrorKind::kGguf, "%s: tensor '%s': type %s (%u) is not supported; supported are%s",
                paths_[static_cast<size_t>(info.part)].c_str(), printable(info.name).c_str(),
                std::string(gguf_type_name(info.type)).c_str(), info.type, supported.c_str());
  }
  const std::byte* base = parts_[static_cast<size_t>(info.part)]->data();
  return {type->type, info.ne[1] * info.ne[2] * info.ne[3], info.ne[0], base + info.offset};
}

Mat GgufFile::maybe(std::string_view name, std::initializer_list<int64_t> ne) const {
  const TensorInfo* info = find(name);
  if (info == nullptr) return {};
  TensorInfo expected;
  if (ne.size() < 1 || ne.size() > expected.ne.size()) {
    throw_error(ErrorKind::kValue, "tensor '%s' is asked for with %zu dimensions, expected 1 to 4",
                printable(name).c_str(), ne.size());
  }
  expected.n_dims = static_cast<int>(ne.size());
  std::copy(ne.begin(), ne.end(), expected.ne.begin());
  if (info->ne != expected.ne) {
    throw_error(ErrorKind::kGguf, "%s: tensor '%s': expected shape %s, found %s",
                paths_[static_cast<size_t>(info->part)].c_str(), printable(name).c_str(),
                expected.shape().c_str(), info->shape().c_str());
  }
  return mat(*info);
}

Mat GgufFile::require(std::string_view name, std::initializer_list<int64_t> ne) const {
  const Mat found = maybe(name, ne);
  if (found.empty()) {
    TensorInfo expected;
    expected.n_dims = static_cast<int>(std::min<size_t>(ne.size(), 4));
    std::copy_n(ne.begin(), expected.n_dims, expected.ne.begin());
    throw_error(ErrorKind::kGguf, "%s: tensor '%s' is missing, expected with shape %s",
                path_.c_str(), printable(name).c_str(), expected.shape().c_str());
  }
  return found;
}

void GgufFile::require_supported_types() const {
  for (const TensorInfo& t : tensors_) mat(t);
}

// ---- The files under it -------------------------------------------------------------------------

void GgufFile::check_unchanged() const {
  for (const auto& part : parts_) part->check_unchanged();
}

void GgufFile::advise_willneed(const Mat& mat) const {
  for (const auto& part : parts_) {
    if (mat.data >= part->data() && mat.data < part->data() + part->size()) {
      part->advise_willneed(mat.data, mat.bytes());
    }
  }
}

void GgufFile::advise_dontneed(const Mat& mat) const {
  for (const auto& part : parts_) {
    if (mat.data >= part->data() && mat.data < part->data() + part->size()) {
      part->advise_dontneed(mat.data, mat.bytes());
    }
  }
}

uint64_t GgufFile::fingerprint() const {
  std::call_once(fingerprint_once_, [&] {
    uint64_t state = parts_.size();
    for (size_t i = 0; i < parts_.size(); ++i) {
      state = hash_sampled_pages(*parts_[i], data_starts_[i], state ^ header_hashes_[i]);
    }
    fingerprint_ = state;
  });
  return fingerprint_;
}

}  // namespace coreinfer
