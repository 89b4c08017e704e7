#include "base/mmap_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <limits>
#include <mutex>

#include "base/error.h"

namespace coreinfer {
namespace {

// ---- SIGBUS guard -------------------------------------------------------------------------------
// Touching a mapped page behind the end of a file that was truncated raises SIGBUS in the reading
// thread. The handler finds the mapping in a fixed table without locks, puts a page of zeros there,
// notes that the mapping is broken and lets the thread go on; whoever computes asks
// check_unchanged() afterwards and throws the result away.

struct Slot {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> broken{false};
};

constexpr int kSlots = 4096;  // mappings at a time in one process; a split model has one a part
Slot g_slots[kSlots];
std::atomic<int> g_slots_used{0};  // slots above were never taken; bounds the handler's search
struct sigaction g_previous;
uintptr_t g_page_bytes = 0;

static_assert(std::atomic<uintptr_t>::is_always_lock_free);
static_assert(std::atomic<bool>::is_always_lock_free);

void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (info->si_code > 0) {  // raised by the kernel for an access, not sent by kill()
    const int used = g_slots_used.load(std::memory_order_acquire);
    for (int i = 0; i < used; ++i) {
      Slot& slot = g_slots[i];
      const uintptr_t begin = slot.begin.load(std::memory_order_acquire);
      if (begin == 0 || address < begin || address >= slot.end.load(std::memory_order_acquire)) {
        continue;
      }
      void* page = reinterpret_cast<void*>(address & ~(g_page_bytes - 1));
      slot.broken.store(true, std::memory_order_release);
      if (mmap(page, g_page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
          page) {
        errno = saved_errno;
        return;
      }
      break;
    }
  }
  errno = saved_errno;
  if (g_previous.sa_flags & SA_SIGINFO) {
    g_previous.sa_sigaction(signal, info, context);
  } else if (g_previous.sa_handler != SIG_DFL && g_previous.sa_handler != SIG_IGN) {
    g_previous.sa_handler(signal);
  } else if (g_previous.sa_handler == SIG_DFL || info->si_code > 0) {
    // The default action, on return: a fault happens again, a sent signal is sent again.
    ::signal(SIGBUS, SIG_DFL);
    if (info->si_code <= 0) raise(SIGBUS);
  }
}

void install_sigbus_guard() {
  g_page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  struct sigaction action = {};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &g_previous);
}

std::mutex g_slots_mutex;  // taken by those who open and close, never by the handler

int take_slot(const void* data, size_t bytes) {
  static std::once_flag once;
  std::call_once(once, install_sigbus_guard);
  std::lock_guard<std::mutex> lock(g_slots_mutex);
  const int used = g_slots_used.load(std::memory_order_relaxed);
  for (int i = 0; i < kSlots; ++i) {
    Slot& slot = g_slots[i];
    if (slot.begin.load(std::memory_order_relaxed) != 0) continue;
    slot.broken.store(false, std::memory_order_relaxed);
    // The last page is mapped as a whole, and a wide load may touch what lies behind the end.
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
    slot.end.store((end + g_page_bytes - 1) & ~(g_page_bytes - 1), std::memory_order_relaxed);
    slot.begin.store(reinterpret_cast<uintptr_t>(data), std::memory_order_release);
    if (i >= used) g_slots_used.store(i + 1, std::memory_order_release);
    return i;
  }
  return -1;
}

void free_slot(int i) {
  std::lock_guard<std::mutex> lock(g_slots_mutex);
  g_slots[i].begin.store(0, std::memory_order_release);
}

// ---- Small helpers ------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& path, const char* doing, int error) {
  throw_error(ErrorKind::kIo, "%s: cannot %s: %s", path.c_str(), doing, std::strerror(error));
}

struct timespec written_at(const struct stat& s) {
#ifdef __APPLE__
  return s.st_mtimespec;
#else
  return s.st_mtim;
#endif
}

// Closes the descriptor if the constructor throws.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

MmapFile::MmapFile(const std::string& path) : path_(path) {
  if (path.find('\0') != std::string::npos) {
    throw_error(ErrorKind::kIo, "%s: a path cannot hold a NUL byte", path.c_str());
  }
  // Without O_NONBLOCK, opening a named pipe would wait for a writer.
  Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(path, "open", errno);
  struct stat s;
  if (fstat(file.fd, &s) != 0) fail(path, "ask for the size", errno);
  if (S_ISDIR(s.st_mode)) fail(path, "read", EISDIR);
  if (!S_ISREG(s.st_mode)) {
    throw_error(ErrorKind::kIo, "%s: not a regular file, so it cannot be mapped", path.c_str());
  }
  if (s.st_size == 0) throw_error(ErrorKind::kIo, "%s: the file is empty", path.c_str());
  if (static_cast<uint64_t>(s.st_size) > std::numeric_limits<size_t>::max() / 2) {
    throw_error(ErrorKind::kIo, "%s: %lld bytes are more than can be mapped", path.c_str(),
                static_cast<long long>(s.st_size));
  }
  size_ = static_cast<size_t>(s.st_size);
  device_ = static_cast<uint64_t>(s.st_dev);
  inode_ = static_cast<uint64_t>(s.st_ino);
  written_seconds_ = written_at(s).tv_sec;
  written_nanoseconds_ = written_at(s).tv_nsec;

  void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) fail(path, "map", errno);
  data_ = static_cast<const std::byte*>(data);
  slot_ = take_slot(data, size_);
  if (slot_ < 0) {
    munmap(data, size_);
    throw_error(ErrorKind::kIo, "%s: %d files are mapped already, close some", path.c_str(),
                kSlots);
  }
  fd_ = file.fd;
  file.fd = -1;
}

MmapFile::~MmapFile() {
  free_slot(slot_);
  munmap(const_cast<std::byte*>(data_), size_);
  close(fd_);
}

void MmapFile::read_at(uint64_t offset, void* destination, size_t bytes) const {
  char* out = static_cast<char*>(destination);
  while (bytes > 0) {
    const size_t want = std::min<size_t>(bytes, size_t{1} << 30);  // the most that Linux does
    const ssize_t got = pread(fd_, out, want, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_, "read", errno);
    if (got == 0) {
      throw_error(ErrorKind::kIo,
                  "%s: truncated while it was being read: %zu bytes at open, now %llu",
                  path_.c_str(), size_, static_cast<unsigned long long>(offset));
    }
    out += got;
    offset += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
}

void MmapFile::check_unchanged() const {
  struct stat s;
  if (fstat(fd_, &s) != 0) fail(path_, "ask for the size", errno);
  if (static_cast<uint64_t>(s.st_size) != size_) {
    throw_error(ErrorKind::kIo,
                "%s: %s while in use: %zu bytes at open, %lld now; results since then are not "
                "valid, restore the file and load it again",
                path_.c_str(), static_cast<uint64_t>(s.st_size) < size_ ? "truncated" : "grown",
                size_, static_cast<long long>(s.st_size));
  }
  if (written_at(s).tv_sec != written_seconds_ || written_at(s).tv_nsec != written_nanoseconds_ ||
      static_cast<uint64_t>(s.st_dev) != device_ || static_cast<uint64_t>(s.st_ino) != inode_) {
    throw_error(ErrorKind::kIo,
                "%s: written to while in use (its time of modification changed); results since "
                "then are not valid, load it again",
                path_.c_str());
  }
  if (g_slots[slot_].broken.load(std::memory_order_acquire)) {
    throw_error(ErrorKind::kIo,
                "%s: a page could not be read while in use (truncated for a moment, or a disk "
                "error); results since then are not valid, load it again",
                path_.c_str());
  }
}

void MmapFile::advise_willneed(const void* begin, size_t bytes) const {
  if (bytes == 0) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) & ~(g_page_bytes - 1);
  const uintptr_t last = reinterpret_cast<uintptr_t>(begin) + bytes;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_WILLNEED);  // advice: may be refused
}

void MmapFile::advise_dontneed(const void* begin, size_t bytes) const {
  const uintptr_t mask = g_page_bytes - 1;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + mask) & ~mask;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~mask;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace coreinfer
