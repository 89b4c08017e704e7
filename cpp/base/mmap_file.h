// MmapFile: a file mapped read-only, safe against being truncated while in use.
// In: a path. Out: bytes at a fixed address for the object's life, errors (kIo) with the system's
// reason. A page that the file lost reads as zeros and marks the mapping broken instead of killing
// the process (SIGBUS); check_unchanged() then throws. It does not notice a file that was replaced
// by rename, nor needs to: the mapping still holds the old one, whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace coreinfer {

class MmapFile {
 public:
  explicit MmapFile(const std::string& path);
  ~MmapFile();
  MmapFile(const MmapFile&) = delete;
  MmapFile& operator=(const MmapFile&) = delete;

  const std::string& path() const { return path_; }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }  // bytes, as at open; never 0

  // Copies bytes through read() instead of the mapping: a short file is an error, never a fault.
  void read_at(uint64_t offset, void* destination, size_t bytes) const;

  // Throws kIo when size, time of writing or identity differ from those at open, or when a page
  // was found missing. One fstat: well under a microsecond on Linux.
  void check_unchanged() const;

  // Advice about a range inside the mapping. dontneed releases the whole pages inside the range
  // from this process; they are read again from the file when touched.
  void advise_willneed(const void* begin, size_t bytes) const;
  void advise_dontneed(const void* begin, size_t bytes) const;

 private:
  std::string path_;
  int fd_ = -1;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  uint64_t device_ = 0, inode_ = 0;
  int64_t written_seconds_ = 0, written_nanoseconds_ = 0;
  int slot_ = -1;  // in the registry that the SIGBUS handler reads
};

}  // namespace coreinfer
