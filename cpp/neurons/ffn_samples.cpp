#include "neurons/ffn_samples.h"

#include <algorithm>
#include <vector>

#include "base/error.h"

namespace coreinfer {
namespace {

constexpr int64_t kRowsAtOnce = 8;  // stay in the second-level cache

}  // namespace

FfnSamples::FfnSamples(Backend& backend, int64_t capacity, int64_t n_layer, int64_t n_ff,
                       int64_t n_embd)
    : backend_(&backend), capacity_(capacity), n_layer_(n_layer), n_ff_(n_ff), n_embd_(n_embd) {
  if (capacity < 1) {
    throw_error(ErrorKind::kValue, "room for %lld FFN samples, expected at least 1",
                static_cast<long long>(capacity));
  }
  h_ = backend.allocate(n_layer * capacity * n_ff);
  y_ = backend.allocate(n_layer * capacity * n_embd);
}

int64_t FfnSamples::first() const { return std::max(first_, n_tokens_ - capacity_); }

void FfnSamples::add(int64_t layer, Rows h, Rows y) {
  store(h, n_tokens_, ring(*h_, layer, n_ff_), n_ff_);
  store(y, n_tokens_, ring(*y_, layer, n_embd_), n_embd_);
}

// Copies the rows that will not be overwritten by later ones of the same call.
void FfnSamples::store(Rows rows, int64_t position, float* ring, int64_t width) {
  for (int64_t done = std::max<int64_t>(rows.n - capacity_, 0); done < rows.n;) {
    const int64_t slot = (position + done) % capacity_;
    const int64_t count = std::min(rows.n - done, capacity_ - slot);
    backend_->norm(rows.slice(done, count), Norm{}, {ring + slot * width, count, width, width});
    done += count;
  }
}

void FfnSamples::keep(int64_t n) {
  first_ = std::min(first(), n);  // what was overwritten does not come back
  n_tokens_ = n;
}

void FfnSamples::visit(const Buffer& buffer, int64_t layer, int64_t width,
                       const Visit& visit) const {
  const float* from = ring(buffer, layer, width);
  std::vector<float> rows(static_cast<size_t>(kRowsAtOnce * width));
  for (int64_t position = first(); position < n_tokens_;) {
    const int64_t slot = position % capacity_;
    const int64_t n = std::min({n_tokens_ - position, capacity_ - slot, kRowsAtOnce});
    backend_->read(from + slot * width, rows.data(), n * width);
    for (int64_t r = 0; r < n; ++r) visit(position - first() + r, rows.data() + r * width);
    position += n;
  }
}

size_t FfnSamples::bytes(int64_t capacity, int64_t n_layer, int64_t n_ff, int64_t n_embd) {
  return static_cast<size_t>(capacity * n_layer * (n_ff + n_embd)) * sizeof(float);
}

}  // namespace coreinfer
