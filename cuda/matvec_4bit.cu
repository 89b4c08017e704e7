// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "matvec_kernel.h"

namespace coreinfer::cuda {

bool matvec_4bit(Context& context, const MatvecArgs& a, bool floats) {
  return launch_quantised<DType::kQ4_0>(context, a, floats) ||
         launch_quantised<DType::kQ4_1>(context, a, floats) ||
         launch_quantised<DType::kQ4_K>(context, a, floats) ||
         launch_quantised<DType::kIQ4_NL>(context, a, floats) ||
         launch_quantised<DType::kIQ4_XS>(context, a, floats);
}

}  // namespace coreinfer::cuda
