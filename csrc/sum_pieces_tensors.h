// Arguments of sum_pieces from its tensors, which grad_reduction/sum_pieces.py has checked.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "sum_pieces.h"

namespace alst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Sum sum_of(const Tensor& pieces_Pn, const Tensor& out_n, double scale, bool accumulate) {
  Sum sum = {};
  sum.pieces = pieces_Pn.const_data_ptr();
  sum.stride = pieces_Pn.stride(0);
  sum.num_pieces = pieces_Pn.size(0);
  sum.out = out_n.mutable_data_ptr();
  sum.n = pieces_Pn.size(1);
  sum.scale = static_cast<float>(scale);
  sum.accumulate = accumulate;
  return sum;
}

}  // namespace alst
