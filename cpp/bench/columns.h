// The table of columns: llama-bench's first and in its order, so that its tools read ours, then
// ours. In: a Row. Out: its values as text. It knows no output format.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/row.h"

namespace coreinfer::bench {

enum class ColumnType { kInt, kBool, kFloat, kText };

struct Column {
  const char* name;
  ColumnType type;
  // kBool values are "0" and "1"; nothing where the column has no meaning for the row.
  std::function<std::optional<std::string>(const Row& row)> value;
};

const std::vector<Column>& columns();

}  // namespace coreinfer::bench
