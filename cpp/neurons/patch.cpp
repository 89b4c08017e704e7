#include "neurons/patch.h"

#include "base/error.h"

namespace coreinfer {
namespace {

WeightPtr load(Backend& backend, const std::vector<uint16_t>& values, int64_t rows, int64_t cols) {
  return backend.load(
      {DType::kF16, rows, cols, reinterpret_cast<const std::byte*>(values.data())});
}

}  // namespace

void attach(Backend& backend, const LayerPatch& patch, FfnWeights& ffn) {
  ffn.patch_in = nullptr;
  ffn.patch_out = nullptr;
  if (patch.rank == 0) return;
  const int64_t k = ffn.down->cols(), n_embd = ffn.down->rows();
  if (static_cast<int64_t>(patch.in.size()) != patch.rank * k ||
      static_cast<int64_t>(patch.out.size()) != n_embd * patch.rank) {
    throw_error(ErrorKind::kValue,
                "a patch of rank %lld with %zu and %zu values, expected (rank, %lld) and (%lld, "
                "rank) for this model",
                static_cast<long long>(patch.rank), patch.in.size(), patch.out.size(),
                static_cast<long long>(k), static_cast<long long>(n_embd));
  }
  ffn.patch_in = load(backend, patch.in, patch.rank, k);
  ffn.patch_out = load(backend, patch.out, n_embd, patch.rank);
}

}  // namespace coreinfer
