#include "kernels/linear.h"

#include "kernels/linear_bf16.h"

namespace coreinfer {

const LinearKernels& linear_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
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

const Bf16Kernels* bf16_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return &bf16_kernels_amx();
  if (isa == Isa::kAvx512Bf16) return &bf16_kernels_avx512();
#endif
  return nullptr;
}

}  // namespace coreinfer
