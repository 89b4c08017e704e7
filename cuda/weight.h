// CudaWeight: a matrix in device memory in the layout of weight_view.h. Made by load (from a mapped
// file) and by compact (from other weights); read by the matrix kernels. Memory is its own, or a
// part of a buffer shared with other matrices.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include <memory>
#include <vector>

#include "backend/backend.h"
#include "context.h"
#include "weight_view.h"

namespace coreinfer::cuda {

// The picked columns of a compacted quantised matrix, in the order in which they are stored.
struct PickedColumns {
  std::vector<uint16_t> steps;  // (n_chunks * 8) half chunk of the source
  std::vector<int32_t> source;  // (n_chunks * 32) column of the source, -1: padding
  std::vector<int32_t> input;   // (n_chunks * 32) which picked column, -1: padding
  int32_t n_chunks() const { return static_cast<int32_t>(steps.size() / kStepsPerChunk); }
};
// `group`: columns of the source that share a scale, 16 or 32; picks ascend.
PickedColumns pick_columns(int group, std::span<const int32_t> picks);

// A matrix comes over in pieces of about this size, where it has to be repacked.
inline constexpr size_t kLoadPiece = size_t{16} << 20;

class CudaWeight final : public Weight {
 public:
  CudaWeight(DType type, int64_t rows, int64_t cols, size_t bytes, const WeightView& view,
             std::shared_ptr<const void> owner) {
    type_ = type;
    rows_ = rows;
    cols_ = cols;
    bytes_ = bytes;
    view_ = view;
    owner_ = std::move(owner);
  }
  ~CudaWeight() override;

  // For use by work that is issued from now on: the stream waits for a load that is under way.
  const WeightView& view() const {
    if (loaded_) await();
    return view_;
  }
  bool quantized() const { return view_.scales != Scales::kNone; }
  // Picked columns of an input row: (n_chunks * 32) device int32, -1 for padding; null: all
  // columns.
  const int32_t* input_columns() const { return input_columns_; }
  void set_input_columns(const int32_t* columns) { input_columns_ = columns; }
  void set_loading(const ContextPtr& context, EventPtr loaded) {
    context_ = context;
    loaded_ = std::move(loaded);
  }

 private:
  void await() const;

  WeightView view_{};
  const int32_t* input_columns_ = nullptr;
  std::shared_ptr<const void> owner_;  // of the memory
  ContextPtr context_;
  mutable EventPtr loaded_;  // null once the stream waits for it
};

// Where the planes of a matrix lie in a buffer. Columns are those stored.
struct PlaneLayout {
  size_t lo = 0, hi = 0, meta = 0, super = 0;  // offsets
  size_t end = 0;
  size_t bytes = 0;  // that one pass reads
};
// Fills the view's shape and strides; places planes from `offset` on, each 256-aligned. Picked
// columns of a quantised matrix: n_chunks of code planes, scales of all source_cols columns.
PlaneLayout layout_planes(DType type, int64_t rows, int64_t source_cols, int32_t n_chunks,
                          size_t offset, WeightView* view);
void place(const PlaneLayout& layout, unsigned char* base, WeightView* view);

int32_t chunks_of(DType type, int64_t cols);

// Brings a matrix from host memory into device memory of its own, beside the work that is under
// way. `raw` is for loads alone.
std::shared_ptr<CudaWeight> load_weight(const ContextPtr& context, const Mat& mat, Memory* raw);

// out (n, cols) float32 from rows of GGUF blocks that lie one after the other in device memory.
// out = scale * value, or out += value where `add`.
void dequantize_source(Context& context, DType type, const uint8_t* source, int64_t rows,
                       int64_t cols, float scale, bool add, float* out, int64_t out_stride);

// Rows [begin, begin + rows) as float16 or float32, (rows, cols) without gaps.
void dequantize_weight(Context& context, const WeightView& view, int64_t cols, int64_t begin,
                       int64_t rows, bool to_float, void* out);

}  // namespace coreinfer::cuda
