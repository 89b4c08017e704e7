// FfnSamples: what went into and came out of each layer's dense FFN for the last tokens of a text,
// kept while a prompt is read. Flows in: a layer's activations and outputs, batch by batch. Flows
// out: rows of float32 in the order of the tokens, from which patch.h learns what dropped neurons
// would have added. At most `capacity` tokens are kept, the latest ones.
#pragma once

#include <cstdint>
#include <functional>

#include "backend/backend.h"

namespace coreinfer {

class FfnSamples {
 public:
  FfnSamples(Backend& backend, int64_t capacity, int64_t n_layer, int64_t n_ff, int64_t n_embd);

  int64_t capacity() const { return capacity_; }
  int64_t n_layer() const { return n_layer_; }
  int64_t n_ff() const { return n_ff_; }
  int64_t n_embd() const { return n_embd_; }
  int64_t n_tokens() const { return n_tokens_; }  // of the text, kept or not
  int64_t first() const;                          // position of the oldest that is kept
  int64_t size() const { return n_tokens_ - first(); }

  // Rows of one layer: h enters the down projection, y leaves it (bias included, no norm). The
  // same number of rows for every layer, then advance(rows).
  void add(int64_t layer, Rows h, Rows y);
  void advance(int64_t n_rows) { n_tokens_ += n_rows; }

  // Forgets all after the first n tokens of the text.
  void keep(int64_t n);
  // Forgets all; the next row belongs to the token at `position`.
  void restart(int64_t position) { first_ = n_tokens_ = position; }

  // The kept rows of a layer, (size(), n_ff) and (size(), n_embd), in the order of the tokens: a
  // call visit(row, values) each, in host memory that is valid until the call returns.
  using Visit = std::function<void(int64_t row, const float* values)>;
  void visit_h(int64_t layer, const Visit& visit) const { this->visit(*h_, layer, n_ff_, visit); }
  void visit_y(int64_t layer, const Visit& visit) const { this->visit(*y_, layer, n_embd_, visit); }

  static size_t bytes(int64_t capacity, int64_t n_layer, int64_t n_ff, int64_t n_embd);
  size_t bytes() const { return bytes(capacity_, n_layer(), n_ff_, n_embd_); }

 private:
  // Where a layer's rows of this width lie in h_ or y_.
  float* ring(const Buffer& buffer, int64_t layer, int64_t width) const {
    return buffer.data() + layer * capacity_ * width;
  }
  void store(Rows rows, int64_t position, float* ring, int64_t width);
  void visit(const Buffer& buffer, int64_t layer, int64_t width, const Visit& visit) const;

  Backend* backend_;  // a pointer, so that samples can be moved
  int64_t capacity_;
  int64_t n_layer_;
  int64_t n_ff_;
  int64_t n_embd_;
  int64_t first_ = 0;  // tokens before this one were never seen, or are forgotten
  int64_t n_tokens_ = 0;
  // In backend memory, two blocks and not two a layer: a GPU rounds each up to its pages. The token
  // at position p lies in row p % capacity of its layer.
  BufferPtr h_;  // (n_layer, capacity, n_ff)
  BufferPtr y_;  // (n_layer, capacity, n_embd)
};

}  // namespace coreinfer
