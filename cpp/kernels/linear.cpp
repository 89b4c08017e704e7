#include "kernels/linear.h"

namespace coreinfer {

const LinearKernels& linear_kernels(Isa isa) {
  switch (isa) {
    default:
      return linear_kernels_scalar();
  }
}

}  // namespace coreinfer
