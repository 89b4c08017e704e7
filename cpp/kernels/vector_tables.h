// Inside the kernels only: each instruction set's file puts its own functions over the plainer ones
// in the three tables of row functions.
#pragma once

#include "kernels/attention_block.h"
#include "kernels/count_row.h"
#include "kernels/vector.h"

namespace coreinfer::kernels {

struct VectorTables {
  VectorKernels vector;
  AttentionKernels attention;
  CountKernels count;
};

void use_scalar(VectorTables& tables);
#if defined(__x86_64__)
void use_avx2(VectorTables& tables);
void use_avx512(VectorTables& tables);
void use_amx(VectorTables& tables);
#elif defined(__aarch64__)
void use_neon(VectorTables& tables);
#endif

}  // namespace coreinfer::kernels
