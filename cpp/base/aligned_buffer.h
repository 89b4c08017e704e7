// Owned host memory, zeroed and aligned to cache lines. AlignedBuffer is committed as a whole and
// asks for huge pages when it is large; Reservation is address space whose pages are committed one
// by one as they are written. Neither knows what lies in it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <utility>

#include "base/error.h"

namespace coreinfer {

inline constexpr size_t kCacheLine = 64;

namespace detail {

// Private zero pages; throws kMemory. `purpose` completes the sentence of the message.
inline void* map_pages(size_t bytes, int flags, const char* purpose) {
  void* p =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (p == MAP_FAILED) {
    throw_error(ErrorKind::kMemory, "the system has no %.1f MiB left to %s",
                static_cast<double>(bytes) / (1 << 20), purpose);
  }
  return p;
}

}  // namespace detail

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    data_ = detail::map_pages(bytes, 0, "allocate");
#ifdef MADV_HUGEPAGE
    if (bytes >= kHugeFrom) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~AlignedBuffer() {
    if (data_) munmap(data_, size_);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  size_t size() const { return size_; }
  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  // For scratch: room for `bytes`, half as much again when it has to grow; the contents are lost.
  void ensure(size_t bytes) {
    if (bytes <= size_) return;
    *this = AlignedBuffer();
    *this = AlignedBuffer(bytes + bytes / 2);
  }

 private:
  static constexpr size_t kHugeFrom = size_t{4} << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

class Reservation {
 public:
  Reservation() = default;
  explicit Reservation(size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    data_ = detail::map_pages(bytes, MAP_NORESERVE, "reserve");
#ifdef MADV_NOHUGEPAGE
    // A huge page would commit 2 MiB for the first byte.
    madvise(data_, bytes, MADV_NOHUGEPAGE);
#endif
  }
  ~Reservation() {
    if (data_) munmap(data_, size_);
  }
  Reservation(Reservation&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Reservation& operator=(Reservation&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  size_t size() const { return size_; }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace coreinfer
