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
  int32_t unused;
};

// grid: (rows, parts of a row)
__global__ void activate(COREINFER_PARAMETER ActivateArgs a) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  float* up = a.up + row * a.up_stride;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x; i < a.width;
       i += static_cast<int64_t>(gridDim.y) * blockDim.x) {
    const float act =
        activated(a.activation, a.gate != nullptr ? a.gate[row * a.gate_stride + i] : up[i]);
    if (a.act_gate != nullptr) a.act_gate[row * a.act_gate_stride + i] = act;
    up[i] = a.gate != nullptr ? act * up[i] : act;
  }
}

}  // namespace

bool matvec_floats(Context& context, const MatvecArgs& a) {
  switch (a.jobs[0].w.codes) {
    case Codes::kF32:
      return launch_matvec<Codes::kF32, true, false>(context, a), true;
    case Codes::kF16:
      return launch_matvec<Codes::kF16, true, false>(context, a), true;
    case Codes::kBF16:
      return launch_matvec<Codes::kBF16, true, false>(context, a), true;
    default:
      return false;
  }
}

void matvec(Context& context, const MatvecArgs& args, bool floats) {
  if (matvec_floats(context, args)) return;
  if (matvec_4bit(context, args, floats)) return;
  matvec_other(context, args, floats);
}

void activate_rows(Context& context, Epilogue activation, Rows up, const float* gate,
                   int64_t gate_stride, float* act_gate, int64_t act_gate_stride) {
  const auto parts = static_cast<unsigned>(divide_up<int64_t>(up.width, 4 * 256));
  context.launch(
      activate, dim3(static_cast<unsigned>(up.n), parts), dim3(256), 0,
      {up.data, up.stride, gate, gate_stride, act_gate, act_gate_stride, up.width, activation, 0});
}

}  // namespace coreinfer::cuda
