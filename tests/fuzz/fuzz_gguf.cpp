// Fuzz entry point of the GGUF reader: arbitrary bytes go through everything a file is asked.
// Only coreinfer::Error of kind kGguf or kIo may come out; anything else is a bug, which a
// sanitizer or the uncaught exception reports.
//
//   coreinfer_fuzz_gguf FILE...                          each file once
//   coreinfer_fuzz_gguf --mutations N --seed S FILE...   and its prefixes and N mutations
//
// LLVMFuzzerTestOneInput is the usual name, so that a libFuzzer build finds it too.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "gguf/gguf_file.h"
#include "kernels/dequantize.h"

namespace {

using coreinfer::Error;
using coreinfer::ErrorKind;
using coreinfer::GgufFile;

using Bytes = std::vector<uint8_t>;

// Calls f; errors that the reader is allowed to throw are swallowed. True when there was none.
template <class F>
bool tolerate(F f) {
  try {
    f();
    return true;
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::kGguf && error.kind() != ErrorKind::kIo) throw;
    return false;
  }
}

void read_metadata(const coreinfer::Metadata& metadata) {
  for (size_t i = 0; i < metadata.size(); ++i) {
    const std::string key(metadata.entry(i).key);
    tolerate([&] { metadata.u32(key); });
    tolerate([&] { metadata.i32(key); });
    tolerate([&] { metadata.u64(key); });
    tolerate([&] { metadata.f32(key); });
    tolerate([&] { metadata.boolean(key); });
    tolerate([&] { metadata.string(key); });
    tolerate([&] { metadata.strings(key); });
    tolerate([&] { metadata.integers(key); });
    tolerate([&] { metadata.floats(key); });
    tolerate([&] { metadata.booleans(key); });
  }
}

void read_tensors(const GgufFile& file) {
  std::vector<float> row;
  for (const coreinfer::TensorInfo& info : file.tensors()) {
    if (info.offset + info.nbytes > file.file_bytes()) std::abort();  // our own mistake
    tolerate([&] {
      const coreinfer::Mat mat = file.mat(info);
      row.resize(static_cast<size_t>(mat.cols));
      for (int64_t r = 0; r < mat.rows; ++r) {
        coreinfer::dequantize_row(mat.type, mat.row(r), row.data(), mat.cols);
      }
    });
  }
}

const std::string& scratch_path() {
  static const std::string path = [] {
    const char* folder = std::getenv("TMPDIR");
    std::string name = std::string(folder ? folder : "/tmp") + "/coreinfer_fuzz_XXXXXX";
    const int fd = mkstemp(name.data());
    if (fd < 0) {
      std::perror(name.c_str());
      std::exit(1);
    }
    close(fd);
    return name;
  }();
  return path;
}

// One to four changes of the kinds that break readers: bits, bytes, counts and lengths set to
// telling values, bytes lost, bytes repeated, the end cut off.
Bytes mutate(Bytes bytes, std::mt19937_64& random) {
  const auto below = [&](size_t n) {
    return static_cast<size_t>(random() % std::max<size_t>(n, 1));
  };
  static constexpr uint64_t kTelling[] = {
      0,          1,          2,          31,         0x7f,       0xff,       0xffff,
      0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 40, 1ull << 62, (1ull << 63) - 1,
      1ull << 63, ~0ull,      ~0ull - 7,  ~0ull - 31};
  const auto overwrite = [&](size_t at, size_t width) {
    const uint64_t value = kTelling[below(std::size(kTelling))];
    std::memcpy(bytes.data() + at, &value, std::min(width, bytes.size() - at));
  };
  for (size_t changes = 1 + below(4); changes > 0 && !bytes.empty(); --changes) {
    const size_t at = below(bytes.size());
    const size_t left = bytes.size() - at;
    switch (below(9)) {
      case 0:
        bytes[at] ^= static_cast<uint8_t>(1u << below(8));
        break;
      case 1:
        bytes[at] = static_cast<uint8_t>(random());
        break;
      case 2:
        overwrite(at, below(2) ? 8 : 4);
        break;
      case 3: {
        const auto first = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        bytes.erase(first,
                    first + static_cast<std::ptrdiff_t>(1 + below(std::min<size_t>(left, 16))));
        break;
      }
      case 4: {
        const Bytes piece(
            bytes.begin() + static_cast<std::ptrdiff_t>(at),
            bytes.begin() + static_cast<std::ptrdiff_t>(at + std::min<size_t>(left, 16)));
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(below(bytes.size())),
                     piece.begin(), piece.end());
        break;
      }
      case 5:
        bytes.resize(at);
        break;
      default: {  // where a run of zeros tells of a small number: a count, a length, an offset
        const auto run = std::search_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), bytes.end(),
                                       5, uint8_t{0});
        const size_t start = static_cast<size_t>(run - bytes.begin()) + below(6);
        if (start >= 2 && start - 2 < bytes.size()) overwrite(start - 2, 8);
      }
    }
  }
  return bytes;
}

}  // namespace

// Under the sanitizers every finding ends the run, an allocation above what the small files of the
// corpus justify included.
extern "C" const char* __ubsan_default_options() { return "halt_on_error=1:print_stacktrace=1"; }
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=1"; }

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::ofstream(scratch_path(), std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  tolerate([] {
    const auto file = GgufFile::open(scratch_path());
    read_metadata(file->metadata());
    read_tensors(*file);
    tolerate([&] { file->require_supported_types(); });
    file->fingerprint();
    file->check_unchanged();
  });
  return 0;
}

#ifndef COREINFER_LIBFUZZER
int main(int argc, char** argv) {
  uint64_t mutations = 0, seed = 0;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if ((argument == "--mutations" || argument == "--seed") && i + 1 < argc) {
      (argument == "--seed" ? seed : mutations) = std::strtoull(argv[++i], nullptr, 10);
    } else {
      paths.push_back(argument);
    }
  }
  if (paths.empty()) {
    std::fprintf(stderr, "usage: %s [--mutations N] [--seed S] FILE...\n", argv[0]);
    return 2;
  }
  uint64_t runs = 0;
  const auto run = [&](const Bytes& bytes) {
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    ++runs;
  };
  for (const std::string& path : paths) {
    std::ifstream in(path, std::ios::binary);
    if (!in) {
      std::fprintf(stderr, "%s: cannot be opened\n", path.c_str());
      return 1;
    }
    const Bytes bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    run(bytes);
    if (mutations == 0) continue;
    for (size_t n = 0; n < bytes.size(); ++n)
      run(Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n)));
    std::mt19937_64 random(seed);
    for (uint64_t i = 0; i < mutations; ++i) run(mutate(bytes, random));
  }
  unlink(scratch_path().c_str());
  std::printf("%llu inputs, no finding\n", static_cast<unsigned long long>(runs));
  return 0;
}
#endif
