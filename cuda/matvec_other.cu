// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "matvec_kernel.h"

namespace coreinfer::cuda {

bool matvec_other(Context& context, const MatvecArgs& a, bool floats) {
  return launch_quantised<DType::kQ8_0>(context, a, floats) ||
         launch_quantised<DType::kQ5_0>(context, a, floats) ||
         launch_quantised<DType::kQ5_1>(context, a, floats) ||
         launch_quantised<DType::kQ2_K>(context, a, floats) ||
         launch_quantised<DType::kQ3_K>(context, a, floats) ||
         launch_quantised<DType::kQ5_K>(context, a, floats) ||
         launch_quantised<DType::kQ6_K>(context, a, floats);
}

}  // namespace coreinfer::cuda
