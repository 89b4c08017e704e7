// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "matvec_kernel.h"

namespace coreinfer::cuda {
namespace {

struct ActivateArgs {
  float* up;
  int64_t up_stride;
  const float* gate;
  int64_t gate_stride;
  float* act_gate;
  int64_t act_gate_stride;
  int64_t width;
  Epilogue activation;
  float threshold;
};

// grid: (rows, parts of a row)
__global__ void activate(COREINFER_PARAMETER ActivateArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  float* up = a.up + row * a.up_stride;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < a.width;
       i += static_cast<int64_t>(gridDim.y) * blockDim.x) {
    const float gate = a.gate != nullptr ? a.gate[row * a.gate_stride + i] : up[i];
    const float act = activated(a.activation, a.threshold, gate);
    if (a.act_gate != nullptr) a.act_gate[row * a.act_gate_stride + i] = act;
    up[i] = a.gate != nullptr ? act * activated_up(a.activation, a.threshold, up[i]) : act;
  }
}

template <DType kType>
bool launch_floats(Context& context, const MatvecArgs& a) {
  if (a.jobs[0].w.format() != format_of(kType)) return false;
  return launch_matvec<kType, true, false>(context, a), true;
}

}  // namespace

bool matvec_floats(Context& context, const MatvecArgs& a) {
  return launch_floats<DType::kF32>(context, a) || launch_floats<DType::kF16>(context, a) ||
         launch_floats<DType::kBF16>(context, a);
}

void matvec(Context& context, MatvecArgs args, bool floats) {
  args.n_warps = 0;
  for (int i = 0; i < args.n_jobs; ++i) {
    args.jobs[i].first = args.n_warps;
    args.n_warps += divide_up<int64_t>(args.jobs[i].w.rows, kPair);
  }
  if (args.epilogue != Epilogue::kStore) {  // up and gate share warps
    args.n_warps = divide_up<int64_t>(args.jobs[0].w.rows, args.n_jobs == 2 ? 1 : kPair);
  }
  if (matvec_floats(context, args)) return;
  if (matvec_4bit(context, args, floats)) return;
  matvec_other(context, args, floats);
}

void activate_rows(Context& context, Epilogue activation, float threshold, Rows up,
                   const float* gate, int64_t gate_stride, float* act_gate,
                   int64_t act_gate_stride) {
  const auto parts = static_cast<unsigned>(divide_up<int64_t>(up.width, 4 * 256));
  context.launch(activate, dim3(static_cast<unsigned>(up.n), parts), dim3(256), 0,
                 {up.data, up.stride, gate, gate_stride, act_gate, act_gate_stride, up.width,
                  activation, threshold});
}

}  // namespace coreinfer::cuda
