// Memory of weights, many in one mapping: a huge page does not end where a matrix does, and small
// matrices get them, too. A core reads them a quarter faster through huge pages than through small
// ones. What is freed is taken again.
#pragma once

#include <cstddef>
#include <memory>

namespace coreinfer {

class WeightMemory {
 public:
  // `apart`: a mapping for each, which the system has back as soon as it is freed.
  explicit WeightMemory(bool apart);

  // At least `bytes`, aligned to cache lines; what it holds is undefined. Freed with its last
  // owner, which may outlive this object. Safe to call from any thread.
  std::shared_ptr<std::byte> take(size_t bytes);

 private:
  class Heap;
  std::shared_ptr<Heap> heap_;  // null: apart
};

}  // namespace coreinfer
