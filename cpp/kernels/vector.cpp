// The tables of every instruction set, made once.
#include "kernels/vector.h"

#include <array>
#include <cmath>

#include "kernels/vector_tables.h"

namespace coreinfer {
namespace {

using kernels::VectorTables;

VectorTables make_tables(Isa isa) {
  VectorTables t;
  kernels::use_scalar(t);
#if defined(__x86_64__)
  if (isa == Isa::kAvx2 || has_avx512(isa)) kernels::use_avx2(t);
  if (has_avx512(isa)) kernels::use_avx512(t);
  if (isa == Isa::kAmx) kernels::use_amx(t);
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) kernels::use_neon(t);
#endif
  return t;
}

const VectorTables& tables(Isa isa) {
  static const std::array<VectorTables, 6> all = {
      make_tables(Isa::kScalar),     make_tables(Isa::kAvx2), make_tables(Isa::kAvx512),
      make_tables(Isa::kAvx512Bf16), make_tables(Isa::kAmx),  make_tables(Isa::kNeon)};
  return all[static_cast<size_t>(isa)];
}

}  // namespace

const VectorKernels& vector_kernels(Isa isa) { return tables(isa).vector; }
const AttentionKernels& attention_kernels(Isa isa) { return tables(isa).attention; }
const CountKernels& count_kernels(Isa isa) { return tables(isa).count; }

int64_t share_of(double share, int64_t count) {
  const double rounded = std::floor(share * static_cast<double>(count) + 0.5);
  const int64_t k = rounded < 1.0 ? 1 : static_cast<int64_t>(rounded);
  return k < count ? k : count;
}

}  // namespace coreinfer
