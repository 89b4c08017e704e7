#include "neurons/column_norms.h"

#include <cmath>

#include "kernels/dequantize.h"

namespace coreinfer {

std::vector<float> column_norms(const Mat& down) {
  std::vector<float> row(static_cast<size_t>(down.cols));
  std::vector<double> squares(row.size());
  for (int64_t r = 0; r < down.rows; ++r) {
    dequantize_row(down.type, down.row(r), row.data(), down.cols);
    for (size_t c = 0; c < row.size(); ++c) squares[c] += static_cast<double>(row[c]) * row[c];
  }
  for (size_t c = 0; c < row.size(); ++c) row[c] = static_cast<float>(std::sqrt(squares[c]));
  return row;
}

}  // namespace coreinfer
