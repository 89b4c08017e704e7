// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include <algorithm>
#include <climits>

#include "neurons.h"

namespace coreinfer::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBins = 2048;
constexpr int32_t kNoneChosen = INT32_MAX;
constexpr int32_t kInfinity = 0x7f800000;

// Floats above zero are ordered as their bits are; others give 0 or less.
__device__ __forceinline__ int32_t key_of(float value, bool magnitude) {
  const int32_t bits = __float_as_int(value);
  return magnitude ? bits & 0x7fffffff : bits;
}

// Working memory of a block's select.
struct SelectMemory {
  int bins[kBins];
  int parts[kThreads / kWarp];
  int bin, above, total;
};

// The sum of `value` over the threads before this one, and over all of them.
__device__ int block_prefix(SelectMemory& memory, int value, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int sum = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, static_cast<unsigned>(offset));
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // parts may still be read from an earlier call
  if (lane == kWarp - 1) memory.parts[warp] = sum;
  __syncthreads();
  int before = 0;
  *total = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w == warp) before = *total;
    *total += memory.parts[w];
  }
  return before + sum - value;
}

// Counts the positive keys that agree with `prefix` above bit `low + n_bits`, by the n_bits bits
// from `low` on.
__device__ void count_bins(SelectMemory& memory, const float* x, int64_t n, bool magnitude,
                           int32_t prefix, int low, int n_bits) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) memory.bins[i] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const int32_t key = key_of(x[i], magnitude);
    if (key > 0 && (key >> (low + n_bits)) == (prefix >> (low + n_bits))) {
      atomicAdd(&memory.bins[(key >> low) & ((1 << n_bits) - 1)], 1);
    }
  }
  __syncthreads();
}

// The bin in which the k-th largest lies: memory.bin, and how many are in higher ones:
// memory.above.
__device__ void find_bin(SelectMemory& memory, int k) {
  constexpr int kEach = kBins / kThreads;
  // Thread t has bins [kBins - kEach (t + 1), kBins - kEach t), so that prefixes run downwards.
  const int last = kBins - 1 - kEach * static_cast<int>(threadIdx.x);
  int mine = 0;
  for (int i = 0; i < kEach; ++i) mine += memory.bins[last - i];
  int total;
  int above = block_prefix(memory, mine, &total);
  if (above < k && above + mine >= k) {
    int bin = last;
    while (above + memory.bins[bin] < k) above += memory.bins[bin--];
    memory.bin = bin;
    memory.above = above;
  }
  __syncthreads();
}

// The key of the k-th largest of the positive entries, and how many ties with it are wanted.
// `first_bins`: count_bins of the top 11 bits has been done.
__device__ void find_threshold(SelectMemory& memory, const float* x, int64_t n, bool magnitude,
                               int k, int32_t* key, int* ties) {
  int32_t prefix = 0;
  int low = 20, n_bits = 11;
  for (;;) {
    find_bin(memory, k);
    prefix |= memory.bin << low;
    k -= memory.above;
    __syncthreads();
    if (low == 0) break;
    n_bits = low == 20 ? 11 : 9;
    low -= n_bits;
    count_bins(memory, x, n, magnitude, prefix, low, n_bits);
  }
  *key = prefix;
  *ties = k;
}

// The index behind the last of the first `ties` entries with this key.
__device__ int find_end(SelectMemory& memory, const float* x, int64_t n, bool magnitude,
                        int32_t key, int ties) {
  int seen = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int equal = i < n && key_of(x[i], magnitude) == key ? 1 : 0;
    int total;
    const int before = block_prefix(memory, equal, &total);
    if (equal != 0 && seen + before == ties - 1) memory.bin = static_cast<int>(i) + 1;
    seen += total;
    if (seen >= ties) break;
  }
  __syncthreads();
  return memory.bin;
}

__device__ int all_bins(SelectMemory& memory) {
  int mine = 0;
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) mine += memory.bins[i];
  int total;
  block_prefix(memory, mine, &total);
  return total;
}

struct ChooseArgs {
  const float* h;
  int64_t stride;
  int64_t width;
  double share;
  RowChoice* choices;
  float* bad;
  int64_t first_row;
  int64_t magnitude;
};

// Row numbers are floats of zero and above, which are ordered as their bits are.
__device__ void note_bad(const ChooseArgs& a, int64_t row) {
  atomicMin(reinterpret_cast<int32_t*>(a.bad),
            __float_as_int(static_cast<float>(a.first_row + row)));
}

// A block a row: its threshold.
__global__ void __launch_bounds__(kThreads) choose_kernel(COREINFER_PARAMETER ChooseArgs a) {
  begin_kernel();
  __shared__ SelectMemory memory;
  const bool magnitude = a.magnitude != 0;
  const int64_t row = blockIdx.x;
  const float* h = a.h + row * a.stride;
  int bad = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    bad |= key_of(h[i], true) >= kInfinity ? 1 : 0;
  }
  bad = block_sum(bad);
  count_bins(memory, h, a.width, magnitude, 0, 20, 11);
  const int positive = all_bins(memory);
  RowChoice choice{0.0, kNoneChosen, 0};
  if (bad != 0) {
    if (threadIdx.x == 0) note_bad(a, row);
  } else if (positive > 0) {
    // max(1, round(share * positive)), never over it; round(x) = floor(x + 0.5)
    int k = static_cast<int>(floor(a.share * static_cast<double>(positive) + 0.5));
    k = k < 1 ? 1 : k > positive ? positive : k;
    int ties;
    __syncthreads();
    find_threshold(memory, h, a.width, magnitude, k, &choice.key, &ties);
    choice.end = find_end(memory, h, a.width, magnitude, choice.key, ties);
  }
  if (threadIdx.x == 0) a.choices[row] = choice;
}

// A block a row: 1 / ||h||^2.
__global__ void __launch_bounds__(kThreads) squares_kernel(COREINFER_PARAMETER ChooseArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const float* h = a.h + row * a.stride;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    sum += static_cast<double>(h[i]) * h[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x != 0) return;
  if (!(sum < 1.7976931348623157e308)) note_bad(a, row);
  a.choices[row] = {sum > 0 ? 1.0 / sum : 0.0, kNoneChosen, 0};
}

struct ScoreArgs {
  const float* h;
  int64_t stride;
  int64_t width;
  int64_t n_rows;
  const RowChoice* choices;
  const float* bad;
  float* scores;
  int32_t magnitude;
  int32_t flock;
  ScoreMark marks[kMaxScoreMarks];
  int64_t n_marks;
};

// Rows that a warp looks at in a turn of its block.
constexpr int kRowsAtOnce = 4;
constexpr int kScoreWarps = 16;
constexpr int kTurnRows = kScoreWarps * kRowsAtOnce;

// What a row adds to the score of neuron i.
__device__ __forceinline__ float term_of(const ScoreArgs& a, const RowChoice& choice, float value,
                                         int64_t i) {
  if (a.flock != 0) {
    return static_cast<float>(static_cast<double>(value) * value * choice.factor);
  }
  const int32_t key = key_of(value, a.magnitude != 0);
  return key > choice.key || (key == choice.key && i < choice.end) ? 1.0f : 0.0f;
}

// A block 32 neurons: its warps make the terms of a turn's rows side by side, the first adds them
// in order while the others make those of the next turn. (Adding a zero changes no score: they are
// not negative.)
__global__ void __launch_bounds__(kScoreWarps* kWarp)
    score_kernel(COREINFER_PARAMETER ScoreArgs a) {
  begin_kernel();
  __shared__ float terms[2][kTurnRows][kWarp];
  if (*a.bad < kNoBadRow) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int n_warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const bool here = i < a.width;
  const bool adds = warp == 0 && here;
  float score = adds ? a.scores[i] : 0.0f;
  int mark = 0;
  int64_t next_mark = a.n_marks > 0 ? a.marks[0].row : a.n_rows + 1;
  const int turn_rows = n_warps * kRowsAtOnce;
  int buffer = 0;
  for (int64_t first = 0; first < a.n_rows; first += turn_rows, buffer ^= 1) {
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int r = j * n_warps + warp;
      const int64_t row = first + r;
      if (here && row < a.n_rows) {
        terms[buffer][r][lane] = term_of(a, a.choices[row], a.h[row * a.stride + i], i);
      }
    }
    __syncthreads();
    if (!adds) continue;
    const int n = static_cast<int>(a.n_rows - first < turn_rows ? a.n_rows - first : turn_rows);
    for (int r = 0; r < n;) {
      const int stop = static_cast<int>(next_mark - first < n ? next_mark - first : n);
#pragma unroll 8
      for (; r < stop; ++r) score += terms[buffer][r][lane];
      if (first + r == next_mark) {
        a.marks[mark++].scores[i] = score;
        next_mark = mark < a.n_marks ? a.marks[mark].row : a.n_rows + 1;
      }
    }
  }
  if (adds) a.scores[i] = score;
}

struct SelectArgs {
  const float* scores;
  int64_t stride;
  int64_t n;
  int64_t k;
  int32_t* found;  // of a row: how many, the first NaN (INT32_MAX: none), then the chosen
  int64_t found_stride;
};

// A block a row: threshold, then the chosen in order.
__global__ void __launch_bounds__(kThreads) select_kernel(COREINFER_PARAMETER SelectArgs a) {
  begin_kernel();
  __shared__ SelectMemory memory;
  __shared__ int32_t first_nan;
  const float* scores = a.scores + blockIdx.x * a.stride;
  int32_t* found = a.found + blockIdx.x * a.found_stride;
  if (threadIdx.x == 0) first_nan = INT32_MAX;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.n; i += kThreads) {
    if (scores[i] != scores[i]) atomicMin(&first_nan, static_cast<int32_t>(i));
  }
  count_bins(memory, scores, a.n, false, 0, 20, 11);
  const int positive = all_bins(memory);
  const int k = a.k < positive ? static_cast<int>(a.k) : positive;
  if (threadIdx.x == 0) {
    found[0] = k;
    found[1] = first_nan;
  }
  if (k < 1) return;
  int32_t key;
  int ties;
  __syncthreads();
  find_threshold(memory, scores, a.n, false, k, &key, &ties);
  const int end = find_end(memory, scores, a.n, false, key, ties);
  int written = 2;
  for (int64_t first = 0; first < a.n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const int32_t mine = i < a.n ? key_of(scores[i], false) : 0;
    const int chosen = mine > key || (mine == key && i < end) ? 1 : 0;
    int total;
    const int before = block_prefix(memory, chosen, &total);
    if (chosen != 0) found[written + before] = static_cast<int32_t>(i);
    written += total;
  }
}

}  // namespace

void accumulate_rows(Context& context, Statistic statistic, double share, Rows h, float* scores,
                     std::span<const ScoreMark> marks, RowChoice* choices, int64_t first_row,
                     float* bad) {
  const int64_t magnitude = statistic == Statistic::kCountAbs ? 1 : 0;
  const bool flock = statistic == Statistic::kFlock;
  context.launch(flock ? squares_kernel : choose_kernel, dim3(static_cast<unsigned>(h.n)),
                 dim3(kThreads), 0,
                 {h.data, h.stride, h.width, share, choices, bad, first_row, magnitude});
  ScoreArgs a{};
  a.h = h.data;
  a.stride = h.stride;
  a.width = h.width;
  a.n_rows = h.n;
  a.choices = choices;
  a.bad = bad;
  a.scores = scores;
  a.magnitude = static_cast<int32_t>(magnitude);
  a.flock = flock ? 1 : 0;
  std::copy(marks.begin(), marks.end(), a.marks);
  a.n_marks = static_cast<int64_t>(marks.size());
  const auto warps = static_cast<unsigned>(h.n < kScoreWarps ? h.n : kScoreWarps);
  context.launch(score_kernel, dim3(static_cast<unsigned>(divide_up<int64_t>(h.width, kWarp))),
                 dim3(warps * kWarp), 0, a);
}

void select_neurons(Context& context, Rows scores, int64_t k, int32_t* found,
                    int64_t found_stride) {
  context.launch(select_kernel, dim3(static_cast<unsigned>(scores.n)), dim3(kThreads), 0,
                 {scores.data, scores.stride, scores.width, k, found, found_stride});
}

}  // namespace coreinfer::cuda
