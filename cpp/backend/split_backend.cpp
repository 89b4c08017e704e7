#include "backend/split_backend.h"

#include <algorithm>
#include <iterator>
#include <mutex>
#include <utility>

#include "base/error.h"

namespace coreinfer {
namespace {

// Floats of both: on the GPU once an operation there has asked for them. Only what never changes,
// norms and biases, is asked for.
class SplitBuffer final : public Buffer {
 public:
  explicit SplitBuffer(BufferPtr host) : host_(std::move(host)) {
    data_ = host_->data();
    size_ = host_->size();
  }

  const BufferPtr& on(Backend& gpu) const {
    if (!device_) {
      device_ = gpu.allocate(size_);
      gpu.write(data_, device_->data(), size_);
    }
    return device_;
  }

 private:
  BufferPtr host_;
  mutable BufferPtr device_;
};

class SplitWeight final : public Weight {
 public:
  SplitWeight(WeightPtr part, bool on_gpu) : part_(std::move(part)), on_gpu_(on_gpu) {
    type_ = part_->type();
    rows_ = part_->rows();
    cols_ = part_->cols();
    bytes_ = part_->bytes();
  }
  const WeightPtr& part() const { return part_; }
  bool on_gpu() const { return on_gpu_; }

 private:
  WeightPtr part_;
  bool on_gpu_;
};

const SplitWeight& split(const Weight& weight) { return static_cast<const SplitWeight&>(weight); }
WeightPtr part_of(const WeightPtr& weight) { return weight ? split(*weight).part() : nullptr; }

class SplitKvCache final : public KvCache {
 public:
  SplitKvCache(const KvSpec& spec, KvCachePtr cpu, KvCachePtr gpu)
      : cpu_(std::move(cpu)), gpu_(std::move(gpu)) {
    spec_ = spec;
  }
  KvCache& cpu() { return *cpu_; }
  KvCache& gpu() { return *gpu_; }

  size_t committed_bytes() const override {
    return cpu_->committed_bytes() + gpu_->committed_bytes();
  }
  size_t position_bytes() const override { return cpu_->position_bytes(); }
  std::vector<std::byte> save(int64_t n) const override {
    std::vector<std::byte> bytes = cpu_->save(n);
    const std::vector<std::byte> rest = gpu_->save(n);
    bytes.insert(bytes.end(), rest.begin(), rest.end());
    return bytes;
  }
  void restore(std::span<const std::byte> bytes, int64_t n) override {
    // Every layer takes the same.
    const auto layers = static_cast<size_t>(cpu_->spec().n_layer);
    const size_t of_cpu = bytes.size() / static_cast<size_t>(spec_.n_layer) * layers;
    cpu_->restore(bytes.first(of_cpu), n);
    gpu_->restore(bytes.subspan(of_cpu), n);
  }

 private:
  KvCachePtr cpu_, gpu_;
};

class SplitBackend final : public Backend {
 public:
  SplitBackend(std::unique_ptr<Backend> cpu, std::unique_ptr<Backend> gpu, GpuPart part)
      : cpu_(std::move(cpu)), gpu_(std::move(gpu)), part_(std::move(part)) {}

  BackendInfo info() const override {
    const BackendInfo cpu = cpu_->info(), gpu = gpu_->info();
    BackendInfo both = cpu;
    both.name = gpu.name + "+" + cpu.name;
    both.isa = gpu.isa + "+" + cpu.isa;
    both.description = format_string("layers from %lld on: %s; the others: %s",
                                     static_cast<long long>(part_.first_layer),
                                     gpu.description.c_str(), cpu.description.c_str());
    both.device = gpu.device;
    both.device_peak = gpu.device_peak;
    return both;
  }

  BufferPtr allocate(int64_t n) override {
    return std::make_shared<SplitBuffer>(cpu_->allocate(n));
  }
  void read(const float* from, float* to, int64_t n) override { cpu_->read(from, to, n); }
  void write(const float* from, float* to, int64_t n) override { cpu_->write(from, to, n); }
  void copy(Rows from, Rows to) override { cpu_->copy(from, to); }
  BufferPtr load_vector(const Mat& mat) override {
    return std::make_shared<SplitBuffer>(cpu_->load_vector(mat));
  }
  WeightPtr load(const Mat& mat) override {
    const bool there = is_on_gpu(mat);
    return std::make_shared<SplitWeight>((there ? gpu_ : cpu_)->load(mat), there);
  }
  WeightPtr load_for_zeros(const Mat& mat) override {
    const bool there = is_on_gpu(mat);
    return std::make_shared<SplitWeight>((there ? gpu_ : cpu_)->load_for_zeros(mat), there);
  }
  KvCachePtr make_kv_cache(const KvSpec& spec) override {
    KvSpec below = spec, above = spec;
    below.n_layer = part_.first_layer;
    above.n_layer = spec.n_layer - part_.first_layer;
    return std::make_unique<SplitKvCache>(spec, cpu_->make_kv_cache(below),
                                          gpu_->make_kv_cache(above));
  }

  void embed(std::span<const int32_t> tokens, const Mat& table, float scale, const Mat& positions,
             int64_t first_position, Rows out) override {
    cpu_->embed(tokens, table, scale, positions, first_position, out);
  }
  void norm(Rows x, const Norm& norm, Rows out) override { cpu_->norm(x, norm, out); }
  void add(Rows x, Rows y, const Norm& norm, const Norm& next) override {
    cpu_->add(x, y, norm, next);
  }

  void linear(Rows x, const Norm& norm, std::span<const Linear> linears) override {
    std::vector<Linear> here, there;
    std::vector<Rows> wanted;  // of those on the GPU
    const std::lock_guard lock(mutex_);
    for (const Linear& l : linears) {
      Linear part = l;
      part.weight = split(*l.weight).part().get();
      if (!split(*l.weight).on_gpu()) {
        here.push_back(part);
        continue;
      }
      if (l.bias != nullptr) part.bias = on_gpu(*l.bias).get();
      wanted.push_back(l.out);
      part.out = l.accumulate ? bring(l.out, wanted.size()) : room(l.out, wanted.size());
      there.push_back(part);
    }
    if (!there.empty()) gpu_->linear(bring(x, 0), on_gpu(norm), there);
    if (!here.empty()) cpu_->linear(x, norm, here);
    for (size_t i = 0; i < there.size(); ++i) fetch(there[i].out, wanted[i]);
  }

  void ffn_hidden(Rows x, const Norm& norm, const FfnWeights& ffn, const Activation& act, Rows h,
                  Rows act_gate) override {
    FfnWeights parts = ffn;
    parts.gate = part_of(ffn.gate);
    parts.up = part_of(ffn.up);
    parts.down = part_of(ffn.down);
    if (!split(*ffn.up).on_gpu()) return cpu_->ffn_hidden(x, norm, parts, act, h, act_gate);
    const std::lock_guard lock(mutex_);
    if (ffn.gate_bias) parts.gate_bias = on_gpu(*ffn.gate_bias);
    if (ffn.up_bias) parts.up_bias = on_gpu(*ffn.up_bias);
    const Rows there = bring(x, 0), hidden = room(h, 1);
    const Rows gate = act_gate.data != nullptr ? room(act_gate, 2) : Rows{};
    gpu_->ffn_hidden(there, on_gpu(norm), parts, act, hidden, gate);
    fetch(hidden, h);
    if (act_gate.data != nullptr) fetch(gate, act_gate);
  }

  void attend(const AttentionSpec& spec, Rows q, Rows k, Rows v, KvCache& cache, int64_t layer,
              int64_t first, Rows out) override {
    auto& both = static_cast<SplitKvCache&>(cache);
    if (layer < part_.first_layer) {
      return cpu_->attend(spec, q, k, v, both.cpu(), layer, first, out);
    }
    const std::lock_guard lock(mutex_);
    AttentionSpec there = spec;
    there.q_norm = on_gpu(spec.q_norm);
    there.k_norm = on_gpu(spec.k_norm);
    const Rows attended = room(out, 3);
    gpu_->attend(there, bring(q, 0), bring(k, 1), bring(v, 2), both.gpu(),
                 layer - part_.first_layer, first, attended);
    fetch(attended, out);
  }

  void accumulate(Statistic statistic, double alpha, Rows h, float* scores,
                  std::span<const ScoreMark> marks, int64_t first_row, float* bad) override {
    cpu_->accumulate(statistic, alpha, h, scores, marks, first_row, bad);
  }
  std::vector<std::vector<int32_t>> select(Rows scores, int64_t k) override {
    return cpu_->select(scores, k);
  }

  CompactWeights compact(std::span<const CompactSource> layers, Room* room) override {
    std::vector<CompactSource> sources[2];  // of the CPU, of the GPU
    {
      const std::lock_guard lock(mutex_);  // other sessions ask for the same biases
      for (const CompactSource& layer : layers) {
        CompactSource source = layer;
        const bool gpu = is_on_gpu(layer.up);
        if (gpu && layer.gate_bias) source.gate_bias = on_gpu(*layer.gate_bias);
        if (gpu && layer.up_bias) source.up_bias = on_gpu(*layer.up_bias);
        sources[gpu ? 1 : 0].push_back(std::move(source));
      }
    }
    CompactWeights made[2];
    if (!sources[0].empty()) made[0] = cpu_->compact(sources[0], room);
    if (!sources[1].empty()) made[1] = gpu_->compact(sources[1], nullptr);
    CompactWeights all;
    all.buffer_bytes = made[0].buffer_bytes + made[1].buffer_bytes;
    all.source_bytes = made[0].source_bytes + made[1].source_bytes;
    size_t taken[2] = {};
    for (const CompactSource& layer : layers) {
      const int side = is_on_gpu(layer.up) ? 1 : 0;
      FfnWeights ffn = std::move(made[side].layers[taken[side]++]);
      for (WeightPtr* w : {&ffn.gate, &ffn.up, &ffn.down}) {
        if (*w) *w = std::make_shared<SplitWeight>(*w, side == 1);
      }
      ffn.down_bias = layer.down_bias;
      all.layers.push_back(std::move(ffn));
    }
    return all;
  }

 private:
  // Rows like these on the GPU, in memory number `slot`.
  Rows room(Rows like, size_t slot) {
    if (slots_.size() <= slot) slots_.resize(slot + 1);
    const int64_t size = like.n * like.width;
    if (!slots_[slot] || slots_[slot]->size() < size) {
      slots_[slot].reset();
      slots_[slot] = gpu_->allocate(size);
    }
    return slots_[slot]->rows(like.n, like.width);
  }
  Rows bring(Rows host, size_t slot) {
    const Rows there = room(host, slot);
    if (host.stride == host.width) {
      gpu_->write(host.data, there.data, host.n * host.width);
    } else {
      for (int64_t r = 0; r < host.n; ++r) {
        gpu_->write(host.data + r * host.stride, there.data + r * there.stride, host.width);
      }
    }
    return there;
  }
  void fetch(Rows there, Rows host) {
    if (host.stride == host.width) return gpu_->read(there.data, host.data, host.n * host.width);
    for (int64_t r = 0; r < host.n; ++r) {
      gpu_->read(there.data + r * there.stride, host.data + r * host.stride, host.width);
    }
  }

  // Matrices are tensors of the file, or rows of them.
  bool is_on_gpu(const Mat& mat) const {
    const auto after = part_.tensors.upper_bound(mat.data);
    return after != part_.tensors.begin() && mat.data < std::prev(after)->second;
  }

  // A buffer of ours on the GPU; one that a compaction there has made is there already.
  BufferPtr on_gpu(const Buffer& buffer) {
    if (const auto* ours = dynamic_cast<const SplitBuffer*>(&buffer)) return ours->on(*gpu_);
    return {std::shared_ptr<void>(), const_cast<Buffer*>(&buffer)};
  }
  Norm on_gpu(const Norm& norm) {
    Norm there = norm;
    if (norm.weight) there.weight = on_gpu(*norm.weight);
    if (norm.bias) there.bias = on_gpu(*norm.bias);
    return there;
  }

  std::unique_ptr<Backend> cpu_, gpu_;
  GpuPart part_;
  std::mutex mutex_;
  std::vector<BufferPtr> slots_;
};

}  // namespace

std::unique_ptr<Backend> make_split_backend(std::unique_ptr<Backend> cpu,
                                            std::unique_ptr<Backend> gpu, GpuPart part) {
  return std::make_unique<SplitBackend>(std::move(cpu), std::move(gpu), std::move(part));
}

}  // namespace coreinfer
