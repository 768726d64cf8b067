// What both devices ask of the tensors of sum_pieces, and what they read of them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "sum_pieces.h"

namespace alst {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_summable(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

// Python's wrapper raises its own errors for these, with the way out; here stands who calls the op itself.
inline Sum checked_sum(const Tensor& pieces_Pn, const Tensor& out_n, double scale, bool accumulate) {
  STD_TORCH_CHECK(pieces_Pn.dim() == 2 && pieces_Pn.size(0) > 0, "sum_pieces: pieces must be [P, n] with P >= 1");
  const int64_t n = pieces_Pn.size(1);
  STD_TORCH_CHECK(n < 2 || pieces_Pn.stride(1) == 1, "sum_pieces: each piece must be contiguous");
  STD_TORCH_CHECK(
      out_n.dim() == 1 && out_n.size(0) == n && out_n.is_contiguous(), "sum_pieces: out must be [n] and contiguous");
  STD_TORCH_CHECK(
      is_summable(pieces_Pn.scalar_type()) && is_summable(out_n.scalar_type()),
      "sum_pieces: pieces and out must be bf16, fp16 or fp32");
  STD_TORCH_CHECK(
      pieces_Pn.is_cuda() == out_n.is_cuda() && pieces_Pn.get_device_index() == out_n.get_device_index(),
      "sum_pieces: pieces and out must be on one device");
  Sum sum = {};
  sum.pieces = pieces_Pn.const_data_ptr();
  sum.stride = pieces_Pn.stride(0);
  sum.num_pieces = pieces_Pn.size(0);
  sum.out = out_n.mutable_data_ptr();
  sum.n = n;
  sum.scale = static_cast<float>(scale);
  sum.accumulate = accumulate;
  return sum;
}

}  // namespace alst
