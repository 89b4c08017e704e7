// Matrix-vector products for 1 to 16 rows, every weight type: one warp two rows of weights, which
// share the reads of the input; each row summed by itself in one order, so that its bits do not
// depend on how many rows there are. Flows in: prepared rows and weights. Flows out: y = W x +
// bias, or the hidden row of a feed-forward network. Larger batches are gemm.h's. Has not run on a
// device yet; the tests run it on the host (tests/cuda_host).
#pragma once

#include "backend/backend.h"
#include "context.h"
#include "prepare.h"
#include "weight_view.h"

namespace coreinfer::cuda {

inline constexpr int kMaxJobs = 3;

struct MatvecJob {
  WeightView w;
  const float* bias;  // (rows) or null
  float* out;
  int64_t out_stride;
  int64_t first;  // warps of the jobs before it; matvec sets it
  int64_t accumulate;
};

enum class Epilogue : int32_t { kStore, kSilu, kGeluTanh, kRelu, kReluBoth };

// kStore: the jobs' outputs one after the other. Else: jobs[0] is up, jobs[1] the gate where n_jobs
// is 2; jobs[0].out receives the hidden row, act_gate (where given) the activated gate. kReluBoth
// is kRelu on both gate and up.
struct MatvecArgs {
  MatvecJob jobs[kMaxJobs];
  PreparedRows x;
  float* act_gate;
  int64_t act_gate_stride;
  int64_t n_warps;  // that have work; matvec sets it
  int32_t n_jobs;
  int32_t n_rows;
  Epilogue epilogue;
  int32_t zeros;    // put behind a hidden row, less than 32
  float threshold;  // of kRelu and kReluBoth
  int32_t unused;
};

// All jobs have the format of jobs[0]. floats: read x.values and not x.codes.
void matvec(Context& context, MatvecArgs args, bool floats);

// h = act(gate) * up, in place of up; rows of equal width. gate null: h = act(up).
void activate_rows(Context& context, Epilogue activation, float threshold, Rows up,
                   const float* gate, int64_t gate_stride, float* act_gate,
                   int64_t act_gate_stride);

}  // namespace coreinfer::cuda
