// The neuron operations of the CUDA backend: accumulate, select, compact.
// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>
#include <climits>
#include <cstring>

#include "backend.h"
#include "gather.h"
#include "neurons.h"

namespace coreinfer::cuda {
namespace {

// Floats of a layer's core, in the buffer of all of them.
class SharedFloats final : public Buffer {
 public:
  SharedFloats(std::shared_ptr<const void> owner, float* data, int64_t n)
      : owner_(std::move(owner)) {
    data_ = data;
    size_ = n;
  }

 private:
  std::shared_ptr<const void> owner_;
};

// A matrix to be made.
struct Target {
  WeightView view{};
  PlaneLayout layout;
  int64_t cols = 0;
  bool empty = true;
};

// Where a layer's parts lie in the buffer. Tables come before the matrices of all layers.
struct Plan {
  Target gate, up, down;
  PickedColumns columns;                                 // of a quantised down projection
  size_t neurons = 0, steps = 0, source = 0, input = 0;  // offsets of tables
  size_t gate_bias = 0, up_bias = 0;
};

size_t align(size_t n) { return (n + 255) / 256 * 256; }

void check(const CompactSource& source) {
  const auto& neurons = source.neurons;
  const int64_t n_ff = source.up.rows;
  if (neurons.empty()) throw_error(ErrorKind::kValue, "a core set without neurons");
  for (size_t i = 0; i < neurons.size(); ++i) {
    if (neurons[i] < 0 || neurons[i] >= n_ff || (i > 0 && neurons[i] <= neurons[i - 1])) {
      throw_error(ErrorKind::kValue, "core neurons must ascend within [0, %lld); entry %zu is %d",
                  static_cast<long long>(n_ff), i, neurons[i]);
    }
  }
}

template <typename T>
size_t put_table(std::vector<unsigned char>* tables, std::span<const T> values) {
  const size_t at = tables->size();
  tables->resize(align(at + values.size_bytes()));
  std::memcpy(tables->data() + at, values.data(), values.size_bytes());
  return at;
}

Target plan_rows(const Mat& from, int64_t n, size_t* offset) {
  Target t;
  if (from.empty()) return t;
  t.empty = false;
  t.cols = from.cols;
  t.layout =
      layout_planes(from.type, n, from.cols, chunks_of(from.type, from.cols), *offset, &t.view);
  *offset = t.layout.end;
  return t;
}

}  // namespace

void CudaBackend::accumulate(Statistic statistic, double alpha, Rows h, float* scores,
                             std::span<const ScoreMark> marks, int64_t first_row, float* bad) {
  if (!(alpha > 0.0 && alpha <= 1.0) && statistic != Statistic::kFlock) {
    throw_error(ErrorKind::kValue, "alpha is %g, expected a share in (0, 1]", alpha);
  }
  if (h.n < 1 || h.width < 1) return;
  if (marks.size() > kMaxScoreMarks) {
    throw_error(ErrorKind::kValue, "%zu marks among the rows, expected at most %zu", marks.size(),
                kMaxScoreMarks);
  }
  const Context::Lock lock(*context_);
  context_->defer(h.n <= kExactRows);
  choices_.ensure(context_, static_cast<size_t>(h.n) * sizeof(RowChoice), "neuron counts");
  accumulate_rows(*context_, statistic, alpha, h, scores, marks, choices_.as<RowChoice>(),
                  first_row, bad);
}

std::vector<std::vector<int32_t>> CudaBackend::select(Rows scores, int64_t k) {
  std::vector<std::vector<int32_t>> result(static_cast<size_t>(scores.n));
  k = std::min(k, scores.width);
  if (scores.n < 1 || k < 1) return result;
  const Context::Lock lock(*context_);
  context_->defer(false);
  // Of each row: how many were found, the first NaN, then the neurons.
  const int64_t stride = 2 + k;
  std::vector<int32_t> found(static_cast<size_t>(scores.n * stride));
  selected_.ensure(context_, found.size() * sizeof(int32_t), "selection");
  select_neurons(*context_, scores, k, selected_.as<int32_t>(), stride);
  context_->copy_out(found.data(), selected_.as<void>(), found.size() * sizeof(int32_t));
  for (size_t i = 0; i < result.size(); ++i) {
    const int32_t* row = found.data() + static_cast<int64_t>(i) * stride;
    if (row[1] != INT32_MAX) {
      throw_error(ErrorKind::kNumeric, "the score of neuron %d of %lld is NaN", row[1],
                  static_cast<long long>(scores.width));
    }
    result[i].assign(row + 2, row + 2 + row[0]);
  }
  return result;
}

// The matrix on the device: where it was loaded to, or a copy for now.
std::shared_ptr<const CudaWeight> CudaBackend::resident(const Mat& mat) {
  const auto found = loaded_.find(mat.data);
  if (found != loaded_.end()) {
    if (auto weight = found->second.lock()) return weight;
    loaded_.erase(found);
  }
  return load_weight(context_, mat, &raw_);
}

CompactWeights CudaBackend::compact(std::span<const CompactSource> layers, Room* room) {
  const Context::Lock lock(*context_);
  context_->defer(false);
  CompactWeights result;
  std::vector<Plan> plans(layers.size());
  std::vector<unsigned char> tables;
  for (size_t i = 0; i < layers.size(); ++i) {
    const CompactSource& source = layers[i];
    Plan& plan = plans[i];
    check(source);
    plan.neurons = put_table(&tables, source.neurons);
    const DTypeTraits& type = traits(source.down.type);
    if (!type.quantized) continue;
    plan.columns = pick_columns(type.group_size, source.neurons);
    plan.steps = put_table(&tables, std::span<const uint16_t>(plan.columns.steps));
    plan.source = put_table(&tables, std::span<const int32_t>(plan.columns.source));
    plan.input = put_table(&tables, std::span<const int32_t>(plan.columns.input));
  }
  size_t offset = tables.size();
  for (size_t i = 0; i < layers.size(); ++i) {
    const CompactSource& source = layers[i];
    const auto n = static_cast<int64_t>(source.neurons.size());
    Plan& plan = plans[i];
    plan.gate = plan_rows(source.gate, n, &offset);
    plan.up = plan_rows(source.up, n, &offset);
    const bool picked = traits(source.down.type).quantized;
    plan.down.empty = false;
    plan.down.cols = n;
    plan.down.layout = layout_planes(
        source.down.type, source.down.rows, source.down.cols,
        picked ? plan.columns.n_chunks() : chunks_of(source.down.type, n), offset, &plan.down.view);
    offset = plan.down.layout.end;
    plan.gate_bias = offset;
    if (source.gate_bias) offset = align(offset + static_cast<size_t>(n) * sizeof(float));
    plan.up_bias = offset;
    if (source.up_bias) offset = align(offset + static_cast<size_t>(n) * sizeof(float));
    result.source_bytes += source.down.bytes();
    for (const Mat* mat : {&source.gate, &source.up}) {
      if (!mat->empty()) result.source_bytes += mat->stride() * source.neurons.size();
    }
  }
  result.buffer_bytes = offset;  // a multiple of 256, so that the next layer can follow

  std::shared_ptr<const void> memory;
  unsigned char* base;
  if (room != nullptr && room->left() >= offset) {
    memory = room->buffer;
    base = reinterpret_cast<unsigned char*>(room->buffer->data()) + room->used;
    room->used += offset;
  } else {
    const auto own = std::make_shared<Memory>(context_, offset, "core-neuron weights");
    base = own->as<unsigned char>();
    memory = own;
  }
  context_->copy_in(base, tables.data(), tables.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const CompactSource& source = layers[i];
    Plan& plan = plans[i];
    const auto* neurons = reinterpret_cast<const int32_t*>(base + plan.neurons);
    const auto n = static_cast<int64_t>(source.neurons.size());
    const auto finish = [&](Target& t, const Mat& mat) {
      return std::make_shared<CudaWeight>(mat.type, t.view.rows, t.cols, t.layout.bytes, t.view,
                                          memory);
    };
    FfnWeights ffn;
    const auto take_rows = [&](Target& t, const Mat& mat) -> WeightPtr {
      place(t.layout, base, &t.view);
      gather_rows(*context_, resident(mat)->view(), neurons, t.view);
      return finish(t, mat);
    };
    if (!source.gate.empty()) ffn.gate = take_rows(plan.gate, source.gate);
    ffn.up = take_rows(plan.up, source.up);
    place(plan.down.layout, base, &plan.down.view);
    const bool picked = traits(source.down.type).quantized;
    if (picked) plan.down.view.steps = reinterpret_cast<const uint16_t*>(base + plan.steps);
    gather_columns(*context_, resident(source.down)->view(),
                   picked ? reinterpret_cast<const int32_t*>(base + plan.source) : neurons, n,
                   plan.down.view);
    const auto down = finish(plan.down, source.down);
    if (picked) down->set_input_columns(reinterpret_cast<const int32_t*>(base + plan.input));
    ffn.down = down;
    const auto take_bias = [&](const BufferPtr& from, size_t at) -> BufferPtr {
      if (!from) return nullptr;
      auto* bias = reinterpret_cast<float*>(base + at);
      gather_floats(*context_, from->data(), neurons, n, bias);
      return std::make_shared<SharedFloats>(memory, bias, n);
    };
    ffn.gate_bias = take_bias(source.gate_bias, plan.gate_bias);
    ffn.up_bias = take_bias(source.up_bias, plan.up_bias);
    ffn.down_bias = source.down_bias;
    result.layers.push_back(std::move(ffn));
    if (source.finished) source.finished();
  }
  if (room == nullptr) {
    context_->synchronize();
  } else {
    context_->full_stop();  // a prefill that goes on does not wait
  }
  return result;
}

}  // namespace coreinfer::cuda
