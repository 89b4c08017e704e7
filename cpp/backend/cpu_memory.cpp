#include "backend/cpu_memory.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <map>
#include <mutex>

#include "base/aligned_buffer.h"

namespace coreinfer {
namespace {

// Mappings grow with what is held, so that a small model does not reserve much.
constexpr size_t kLeastMapping = size_t{4} << 20, kMostMapping = size_t{256} << 20;

struct Mapping {
  explicit Mapping(size_t bytes) : memory(bytes), free{{0, bytes}} {}

  AlignedBuffer memory;
  std::map<size_t, size_t> free;  // begin and end of each range
};

}  // namespace

class WeightMemory::Heap {
 public:
  using Place = std::pair<std::list<Mapping>::iterator, size_t>;  // mapping, offset

  Place take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto m = mappings_.begin(); m != mappings_.end(); ++m) {
      for (const auto& [begin, end] : m->free) {
        if (end - begin >= bytes) return {m, cut(*m, begin, bytes)};
      }
    }
    const size_t size = std::max(bytes, std::clamp(held_, kLeastMapping, kMostMapping));
    held_ += size;
    const auto m = mappings_.emplace(mappings_.end(), size);
    return {m, cut(*m, 0, bytes)};
  }

  void give_back(const Place& place, size_t bytes) {
    const std::lock_guard lock(mutex_);
    auto& [m, begin] = place;
    size_t first = begin, end = begin + bytes;
    auto after = m->free.lower_bound(begin);
    if (after != m->free.begin() && std::prev(after)->second == begin) {
      first = std::prev(after)->first;
      m->free.erase(std::prev(after));
    }
    if (after != m->free.end() && after->first == end) {
      end = after->second;
      m->free.erase(after);
    }
    m->free.emplace(first, end);
    if (end - first == m->memory.size()) {
      held_ -= m->memory.size();
      mappings_.erase(m);
    }
  }

 private:
  static size_t cut(Mapping& m, size_t begin, size_t bytes) {
    const size_t end = m.free.at(begin);
    m.free.erase(begin);
    if (begin + bytes < end) m.free.emplace(begin + bytes, end);
    return begin;
  }

  std::mutex mutex_;
  std::list<Mapping> mappings_;
  size_t held_ = 0;  // bytes of all mappings
};

WeightMemory::WeightMemory(bool apart) : heap_(apart ? nullptr : std::make_shared<Heap>()) {}

std::shared_ptr<std::byte> WeightMemory::take(size_t bytes) {
  bytes = (std::max(bytes, size_t{1}) + kCacheLine - 1) / kCacheLine * kCacheLine;
  if (!heap_) {
    const auto own = std::make_shared<AlignedBuffer>(bytes);
    return {own, own->as<std::byte>()};
  }
  const Heap::Place place = heap_->take(bytes);
  return {place.first->memory.as<std::byte>() + place.second,
          [heap = heap_, place, bytes](std::byte*) { heap->give_back(place, bytes); }};
}

}  // namespace coreinfer
