// Two sessions that share a backend, as ctypes calls it: the second asks for its position between
// the first one's attention and the flush that carries it out.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "backend/cuda_loader.h"

using namespace coreinfer;

namespace {

constexpr int64_t kContext = 2048, kWidth = 32;

struct Session {
  Session(Backend& backend, float seed) : cache(backend.make_kv_cache(spec())) {
    q = backend.allocate(kWidth);
    k = backend.allocate(kWidth);
    v = backend.allocate(kWidth);
    out = backend.allocate(kWidth);
    const std::vector<float> ones(kWidth, seed);
    for (const BufferPtr& b : {q, k, v}) backend.write(ones.data(), b->data(), kWidth);
  }
  static KvSpec spec() { return {KvType::kF32, KvType::kF32, 1, kContext, kWidth, kWidth}; }
  void attend(Backend& backend, int64_t position) {
    AttentionSpec attention;
    attention.n_head = attention.n_head_kv = 1;
    attention.head_dim = kWidth;
    backend.attend(attention, q->rows(1, kWidth), k->rows(1, kWidth), v->rows(1, kWidth), *cache, 0,
                   position, out->rows(1, kWidth));
  }
  KvCachePtr cache;
  BufferPtr q, k, v, out;
};

}  // namespace

// 0: as if alone; positions of the two lie on both sides of a growth of the partial sums.
extern "C" __attribute__((visibility("default"))) int interleaved(MakeCudaBackend make) {
  const CudaOptions options;
  char message[512] = "";
  int kind = 0;
  const std::unique_ptr<Backend> backend(
      make(kCudaInterface, &options, &kind, message, sizeof(message)));
  if (backend == nullptr) return std::fprintf(stderr, "%s\n", message), 2;
  Session first(*backend, 1.0f), second(*backend, 3.0f);
  // Keys and values are zero but at the positions that attend writes.
  const std::vector<std::byte> zeros(2 * kContext * kWidth * sizeof(float));
  first.cache->restore(zeros, kContext);
  second.cache->restore(zeros, kContext);
  float got[kWidth];
  second.attend(*backend, 5);
  backend->read(second.out->data(), got, kWidth);  // so that its position waits no more
  first.attend(*backend, 1500);                    // grows, where partial sums had room for less
  second.attend(*backend, 6);  // before the first one's work is issued, in the same place
  backend->read(first.out->data(), got, kWidth);
  // One value of 1 among 1500 zeros, its score 32 (scale 1) against 0.
  const double weight = std::exp(32.0) / (std::exp(32.0) + 1500.0);
  return std::fabs(got[0] - weight) < 1e-5 ? 0
                                           : (std::fprintf(stderr, "%g %g\n", got[0], weight), 1);
}
