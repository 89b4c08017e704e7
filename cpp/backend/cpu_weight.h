// CpuWeight: a matrix as the CPU computes with it. Quantised types are packed strips
// (kernels/packed_format.h), float types plain rows, or columns where most inputs are zero, in
// memory of their own or in a buffer shared with other matrices. Made by load and compact, read by
// linear and ffn_hidden.
#pragma once

#include <memory>
#include <utility>

#include "backend/backend.h"
#include "kernels/packed_format.h"

namespace coreinfer {

// A float matrix that is stored column by column; not an owner.
struct ColumnsView {
  DType type = DType::kF32;
  int64_t rows = 0;  // outputs; each column is padded to whole strips of 16 with zeros
  int64_t cols = 0;
  std::byte* data = nullptr;

  int64_t padded_rows() const { return (rows + kStripRows - 1) / kStripRows * kStripRows; }
  size_t stride() const { return row_bytes(type, padded_rows()); }
  size_t bytes() const { return stride() * static_cast<size_t>(cols); }
  // Where a column has the element of a row.
  std::byte* at(int64_t col, int64_t row) const {
    return data + stride() * static_cast<size_t>(col) + row_bytes(type, row);
  }
};

class CpuWeight final : public Weight {
 public:
  // `owner` keeps the strips alive; the view's columns are `columns`.
  CpuWeight(const PackedView& strips, ColumnGroupsPtr columns, std::shared_ptr<const void> owner)
      : strips_(strips), columns_(std::move(columns)), owner_(std::move(owner)) {
    type_ = strips.type;
    rows_ = strips.rows;
    cols_ = columns_->n_cols;
    bytes_ = strips.bytes();
  }

  // `owner` keeps the rows alive.
  CpuWeight(const Mat& plain, std::shared_ptr<const void> owner)
      : plain_(plain), owner_(std::move(owner)) {
    type_ = plain.type;
    rows_ = plain.rows;
    cols_ = plain.cols;
    bytes_ = plain.bytes();
  }

  // `owner` keeps the columns alive.
  CpuWeight(const ColumnsView& by_columns, std::shared_ptr<const void> owner)
      : by_columns_(by_columns), owner_(std::move(owner)) {
    type_ = by_columns.type;
    rows_ = by_columns.rows;
    cols_ = by_columns.cols;
    bytes_ = by_columns.bytes();
  }

  bool packed() const { return columns_ != nullptr; }
  bool stored_by_columns() const { return by_columns_.data != nullptr; }
  const PackedView& strips() const { return strips_; }           // when packed
  const ColumnGroupsPtr& columns() const { return columns_; }    // null when not packed
  const ColumnsView& by_columns() const { return by_columns_; }  // when stored so
  const Mat& plain() const { return plain_; }                    // when neither

 private:
  PackedView strips_;
  Mat plain_;
  ColumnsView by_columns_;
  ColumnGroupsPtr columns_;
  std::shared_ptr<const void> owner_;
};

}  // namespace coreinfer
