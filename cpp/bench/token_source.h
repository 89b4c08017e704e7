// TokenSource: the ids that tests feed to a model, the same for every repetition and every row of a
// group. In: a file of ids, or a seed. Out: the first n ids. It needs no tokenizer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace coreinfer::bench {

class TokenSource {
 public:
  // path "": ids drawn evenly from the vocabulary with the seed. Throws kIo or kValue for a file
  // that cannot be read or holds something else than ids.
  TokenSource(const std::string& path, uint64_t seed);

  // Throws kValue when the file has fewer than n ids.
  void require(int64_t n) const;
  // The same, and when one of them is not in [0, n_vocab).
  std::vector<int32_t> first(int64_t n, int64_t n_vocab) const;

 private:
  std::string path_;
  uint64_t seed_;
  std::vector<int32_t> ids_;  // of the file
};

}  // namespace coreinfer::bench
