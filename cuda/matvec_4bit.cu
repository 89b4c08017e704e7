// Has not run on a device yet; the tests run it on the host (tests/cuda_host).
#include "matvec_kernel.h"

namespace coreinfer::cuda {

bool matvec_4bit(Context& context, const MatvecArgs& a, bool floats) {
  switch (a.jobs[0].w.codes) {
    case Codes::k4:
      return launch_quantised<Codes::k4>(context, a, floats), true;
    case Codes::k4Lookup:
      return launch_quantised<Codes::k4Lookup>(context, a, floats), true;
    case Codes::k5:
      return launch_quantised<Codes::k5>(context, a, floats), true;
    default:
      return false;
  }
}

}  // namespace coreinfer::cuda
