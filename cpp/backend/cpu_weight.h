// CpuWeight: a matrix as the CPU computes with it. Quantised types are packed strips
// (kernels/packed_format.h), float types plain rows, in memory of their own or in a buffer shared
// with other matrices. Made by load and compact, read by linear and ffn_hidden.
#pragma once

#include <memory>
#include <utility>

#include "backend/backend.h"
#include "kernels/packed_format.h"

namespace coreinfer {

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

  bool packed() const { return columns_ != nullptr; }
  const PackedView& strips() const { return strips_; }         // when packed
  const ColumnGroupsPtr& columns() const { return columns_; }  // null when not packed
  const Mat& plain() const { return plain_; }                  // when not packed

 private:
  PackedView strips_;
  Mat plain_;
  ColumnGroupsPtr columns_;
  std::shared_ptr<const void> owner_;
};

}  // namespace coreinfer
