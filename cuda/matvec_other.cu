// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "matvec_kernel.h"

namespace coreinfer::cuda {

bool matvec_other(Context& context, const MatvecArgs& a, bool floats) {
  switch (a.jobs[0].w.codes) {
    case Codes::k8:
      return launch_quantised<Codes::k8>(context, a, floats), true;
    case Codes::k6:
      return launch_quantised<Codes::k6>(context, a, floats), true;
    case Codes::k3:
      return launch_quantised<Codes::k3>(context, a, floats), true;
    case Codes::k2:
      return launch_quantised<Codes::k2>(context, a, floats), true;
    default:
      return false;
  }
}

}  // namespace coreinfer::cuda
