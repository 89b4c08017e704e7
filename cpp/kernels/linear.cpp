#include "kernels/linear.h"

namespace coreinfer {

const LinearKernels& linear_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
    case Isa::kAvx512:
      return linear_kernels_avx512();
    case Isa::kAvx2:
      return linear_kernels_avx2();
#elif defined(__aarch64__)
    case Isa::kNeon:
      return linear_kernels_neon();
#endif
    default:
      return linear_kernels_scalar();
  }
}

}  // namespace coreinfer
