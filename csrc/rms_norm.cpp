// rms_norm and rms_norm_backward on CPU; the definitions are in kernels/rms_norm_ops.py.
//
// Legend: T rows, H elements of a row. A row stays in the cache from its first reading to its second.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "dtypes.h"

namespace {

using namespace alst;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 32;          // sums side by side, as vector registers hold them
constexpr int64_t kRowsOfSum = 64;  // rows of one sum of the weight's gradient, at least
constexpr int64_t kMostSums = 64;   // the rows' partition does not depend on the number of threads

struct Row {
  int64_t H;
  float eps;
  const float* weight;  // offset included; ones where there is no weight
};

template <typename In>
ALST_INLINE float scale_of(const typename In::Stored* x, const Row& row) {
  alignas(64) float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= row.H; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += In::widen(x[i + k]) * In::widen(x[i + k]);
  }
  for (; i < row.H; ++i) lanes[i % kLanes] += In::widen(x[i]) * In::widen(x[i]);
  return 1.0f / std::sqrt(std::accumulate(lanes, lanes + kLanes, 0.0f) / static_cast<float>(row.H) + row.eps);
}

template <typename In>
ALST_INLINE void normalize(const void* from, void* to, const Row& row, bool cast_first) {
  const auto* __restrict x = static_cast<const typename In::Stored*>(from);
  auto* __restrict y = static_cast<typename In::Stored*>(to);
  const float scale = scale_of<In>(x, row);
  if (cast_first) {
    for (int64_t i = 0; i < row.H; ++i) y[i] = In::narrow(In::widen(In::narrow(In::widen(x[i]) * scale)) * row.weight[i]);
  } else {
    for (int64_t i = 0; i < row.H; ++i) y[i] = In::narrow(In::widen(x[i]) * scale * row.weight[i]);
  }
}

// `sum` is the weight's gradient, to be added to; null if it is not wanted.
template <typename In>
ALST_INLINE void differentiate(const void* grad, const void* from, void* to, const Row& row, float* __restrict sum) {
  const auto* __restrict dy = static_cast<const typename In::Stored*>(grad);
  const auto* __restrict x = static_cast<const typename In::Stored*>(from);
  auto* __restrict dx = static_cast<typename In::Stored*>(to);
  const float scale = scale_of<In>(x, row);
  alignas(64) float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= row.H; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += In::widen(dy[i + k]) * row.weight[i + k] * In::widen(x[i + k]);
  }
  for (; i < row.H; ++i) lanes[i % kLanes] += In::widen(dy[i]) * row.weight[i] * In::widen(x[i]);
  const float mean = std::accumulate(lanes, lanes + kLanes, 0.0f) * scale / static_cast<float>(row.H);
  for (i = 0; sum != nullptr && i < row.H; ++i) sum[i] += In::widen(dy[i]) * (In::widen(x[i]) * scale);
  for (i = 0; i < row.H; ++i) {
    dx[i] = In::narrow(scale * (In::widen(dy[i]) * row.weight[i] - In::widen(x[i]) * scale * mean));
  }
}

ALST_CLONES void forward_bf16(const void* x, void* y, const Row& r, bool c) { normalize<Bf16>(x, y, r, c); }
ALST_CLONES void forward_fp16(const void* x, void* y, const Row& r, bool c) { normalize<Fp16>(x, y, r, c); }
ALST_CLONES void forward_fp32(const void* x, void* y, const Row& r, bool c) { normalize<Fp32>(x, y, r, c); }
ALST_CLONES void backward_bf16(const void* dy, const void* x, void* dx, const Row& r, float* s) {
  differentiate<Bf16>(dy, x, dx, r, s);
}
ALST_CLONES void backward_fp16(const void* dy, const void* x, void* dx, const Row& r, float* s) {
  differentiate<Fp16>(dy, x, dx, r, s);
}
ALST_CLONES void backward_fp32(const void* dy, const void* x, void* dx, const Row& r, float* s) {
  differentiate<Fp32>(dy, x, dx, r, s);
}

struct Kernels {
  void (*forward)(const void*, void*, const Row&, bool);
  void (*backward)(const void*, const void*, void*, const Row&, float*);
};

Kernels kernels_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return {forward_bf16, backward_bf16};
  if (dtype == ScalarType::Half) return {forward_fp16, backward_fp16};
  return {forward_fp32, backward_fp32};
}

bool is_known(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

int64_t row_bytes(const Tensor& x) { return x.stride(0) * (x.scalar_type() == ScalarType::Float ? 4 : 2); }

void check(const Tensor& x, const char* what) {
  STD_TORCH_CHECK(
      is_known(x.scalar_type()) && x.dim() == 2 && (x.numel() == 0 || x.size(1) == 1 || x.stride(1) == 1),
      what, " must be [T, H] of bf16, fp16 or fp32, with contiguous rows");
}

std::vector<float> factors(const std::optional<Tensor>& weight, int64_t H, double offset) {
  std::vector<float> found(H, 1.0f);
  if (!weight.has_value()) return found;
  const auto dtype = weight->scalar_type();
  STD_TORCH_CHECK(
      is_known(dtype) && weight->dim() == 1 && weight->size(0) == H, "rms_norm: the weight must be [H]");
  const int64_t step = weight->stride(0);
  const auto* narrow = static_cast<const uint16_t*>(weight->const_data_ptr());
  const auto* wide = static_cast<const float*>(weight->const_data_ptr());
  for (int64_t i = 0; i < H; ++i) {
    const float value = dtype == ScalarType::Float      ? wide[i * step]
                        : dtype == ScalarType::BFloat16 ? Bf16::widen(narrow[i * step])
                                                        : Fp16::widen(narrow[i * step]);
    found[i] = value + static_cast<float>(offset);
  }
  return found;
}

Tensor rms_norm(Tensor x_TH, std::optional<Tensor> weight_H, double eps, double offset, bool cast_first) {
  check(x_TH, "rms_norm: x");
  const int64_t T = x_TH.size(0), H = x_TH.size(1);
  Tensor y_TH = torch::stable::new_empty(x_TH, {T, H});
  const auto weight = factors(weight_H, H, offset);
  const Row row = {H, static_cast<float>(eps), weight.data()};
  const auto forward = kernels_of(x_TH.scalar_type()).forward;
  const auto* x = static_cast<const char*>(x_TH.const_data_ptr());
  auto* y = static_cast<char*>(y_TH.mutable_data_ptr());
  const int64_t x_bytes = row_bytes(x_TH), y_bytes = row_bytes(y_TH);
  torch::stable::parallel_for(0, T, std::max<int64_t>(1, 16384 / H), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) forward(x + i * x_bytes, y + i * y_bytes, row, cast_first);
  });
  return y_TH;
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    Tensor dy_TH,
    Tensor x_TH,
    std::optional<Tensor> weight_H,
    double eps,
    double offset,
    bool weight_gradient) {
  check(x_TH, "rms_norm_backward: x");
  check(dy_TH, "rms_norm_backward: dy");
  const int64_t T = x_TH.size(0), H = x_TH.size(1);
  STD_TORCH_CHECK(
      dy_TH.size(0) == T && dy_TH.size(1) == H && dy_TH.scalar_type() == x_TH.scalar_type(),
      "rms_norm_backward: dy must be as x");
  Tensor dx_TH = torch::stable::new_empty(x_TH, {T, H});
  const auto weight = factors(weight_H, H, offset);
  const Row row = {H, static_cast<float>(eps), weight.data()};
  const auto backward = kernels_of(x_TH.scalar_type()).backward;
  const auto* x = static_cast<const char*>(x_TH.const_data_ptr());
  const auto* dy = static_cast<const char*>(dy_TH.const_data_ptr());
  auto* dx = static_cast<char*>(dx_TH.mutable_data_ptr());
  const int64_t x_bytes = row_bytes(x_TH), dy_bytes = row_bytes(dy_TH), dx_bytes = row_bytes(dx_TH);
  const bool weighs = weight_gradient && weight_H.has_value();
  const int64_t rows = std::max(kRowsOfSum, (T + kMostSums - 1) / kMostSums), parts = (T + rows - 1) / rows;
  std::vector<float> sums(weighs ? parts * H : 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      float* sum = weighs ? sums.data() + part * H : nullptr;
      for (int64_t i = part * rows; i < std::min(T, (part + 1) * rows); ++i) {
        backward(dy + i * dy_bytes, x + i * x_bytes, dx + i * dx_bytes, row, sum);
      }
    }
  });
  Tensor dweight_H = torch::stable::new_empty(x_TH, {weighs ? H : 0}, ScalarType::Float);
  auto* total = static_cast<float*>(dweight_H.mutable_data_ptr());
  if (weighs) std::fill(total, total + H, 0.0f);
  for (int64_t part = 0; weighs && part < parts; ++part) {
    for (int64_t i = 0; i < H; ++i) total[i] += sums[part * H + i];
  }
  return {dx_TH, dweight_H};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}
