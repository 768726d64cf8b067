// gated_activation_ and gated_gradients_ on CPU: act(gate) * up and its gradients, in place; the definitions are in
// kernels/gated.py.
//
// Legend: t rows, F inner features.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "dtypes.h"
#include "maths.h"

namespace {

using namespace alst;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElements = 1 << 15;  // a thread's at least

struct ActAndSlope {
  float act, slope;
};

// Beyond kReach the activation is 0 or its argument to the last digit, and a slope made of larger numbers would be the
// difference of infinities. `low` and `x` are the argument within it from below, and from both sides.

struct Silu {
  static constexpr float kReach = 80.0f;
  static ALST_INLINE ActAndSlope of(float low, float x) {
    const Sigmoid s = sigmoid_within(x);
    return {low * s.share, s.share * (1.0f + x * s.rest)};
  }
};

struct Gelu {
  static constexpr float kReach = 12.5f;
  static ALST_INLINE ActAndSlope of(float low, float x) {
    const float bell = exp_within(-0.5f * x * x), share = normal_of(x, bell);
    return {low * share, share + 0.3989422804f * x * bell};
  }
};

// (1 + tanh(y)) / 2 is the sigmoid of 2y.
struct GeluTanh {
  static constexpr float kReach = 9.5f;
  static ALST_INLINE ActAndSlope of(float low, float x) {
    const Sigmoid s = sigmoid_within(1.5957691216f * x * (1.0f + 0.044715f * x * x));
    return {low * s.share, s.share * (1.0f + x * s.rest * (1.5957691216f * (1.0f + 0.134145f * x * x)))};
  }
};

// NaN is NaN.
template <typename Act>
ALST_INLINE ActAndSlope act_and_slope(float gate) {
  const float low = choose(gate < -Act::kReach, -Act::kReach, gate);
  return Act::of(low, choose(low > Act::kReach, Act::kReach, low));
}

template <typename In, typename Act>
ALST_INLINE void activate_row(void* gate_row, const void* up_row, int64_t F) {
  auto* __restrict gate = static_cast<typename In::Stored*>(gate_row);
  auto* __restrict up = static_cast<const typename In::Stored*>(up_row);
  for (int64_t i = 0; i < F; ++i) gate[i] = In::narrow(act_and_slope<Act>(In::widen(gate[i])).act * In::widen(up[i]));
}

template <typename In, typename Act>
ALST_INLINE void differentiate_row(void* gate_row, void* up_row, void* grad_row, int64_t F) {
  auto* __restrict gate = static_cast<typename In::Stored*>(gate_row);
  auto* __restrict up = static_cast<typename In::Stored*>(up_row);
  auto* __restrict grad = static_cast<typename In::Stored*>(grad_row);
  for (int64_t i = 0; i < F; ++i) {
    const ActAndSlope found = act_and_slope<Act>(In::widen(gate[i]));
    const float u = In::widen(up[i]), d = In::widen(grad[i]);
    gate[i] = In::narrow(d * u * found.slope);
    up[i] = In::narrow(d * found.act);
    grad[i] = In::narrow(found.act * u);
  }
}

template <typename In>
ALST_INLINE void activate(void* gate, const void* up, int64_t F, int64_t kind) {
  if (kind == 0) return activate_row<In, Silu>(gate, up, F);
  if (kind == 1) return activate_row<In, Gelu>(gate, up, F);
  activate_row<In, GeluTanh>(gate, up, F);
}

template <typename In>
ALST_INLINE void differentiate(void* gate, void* up, void* grad, int64_t F, int64_t kind) {
  if (kind == 0) return differentiate_row<In, Silu>(gate, up, grad, F);
  if (kind == 1) return differentiate_row<In, Gelu>(gate, up, grad, F);
  differentiate_row<In, GeluTanh>(gate, up, grad, F);
}

ALST_CLONES void act_bf16(void* gate, const void* up, int64_t F, int64_t kind) { activate<Bf16>(gate, up, F, kind); }
ALST_CLONES void act_fp16(void* gate, const void* up, int64_t F, int64_t kind) { activate<Fp16>(gate, up, F, kind); }
ALST_CLONES void act_fp32(void* gate, const void* up, int64_t F, int64_t kind) { activate<Fp32>(gate, up, F, kind); }
ALST_CLONES void grad_bf16(void* gate, void* up, void* grad, int64_t F, int64_t kind) {
  differentiate<Bf16>(gate, up, grad, F, kind);
}
ALST_CLONES void grad_fp16(void* gate, void* up, void* grad, int64_t F, int64_t kind) {
  differentiate<Fp16>(gate, up, grad, F, kind);
}
ALST_CLONES void grad_fp32(void* gate, void* up, void* grad, int64_t F, int64_t kind) {
  differentiate<Fp32>(gate, up, grad, F, kind);
}

struct Kernels {
  void (*activate)(void*, const void*, int64_t, int64_t);
  void (*differentiate)(void*, void*, void*, int64_t, int64_t);
  int64_t size;
};

constexpr Kernels kBf16 = {act_bf16, grad_bf16, 2};
constexpr Kernels kFp16 = {act_fp16, grad_fp16, 2};
constexpr Kernels kFp32 = {act_fp32, grad_fp32, 4};

const Kernels& kernels_of(ScalarType dtype) {
  STD_TORCH_CHECK(
      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float,
      "gated: tensors must be bf16, fp16 or fp32");
  return dtype == ScalarType::BFloat16 ? kBf16 : dtype == ScalarType::Half ? kFp16 : kFp32;
}

void check(const Tensor& x, const Tensor& first, int64_t kind) {
  STD_TORCH_CHECK(
      x.dim() == 2 && x.size(0) == first.size(0) && x.size(1) == first.size(1) &&
          x.scalar_type() == first.scalar_type() && (x.size(1) <= 1 || x.stride(1) == 1) && kind >= 0 && kind <= 2,
      "gated: tensors must be [t, F] of one dtype with contiguous rows, and the activation 0, 1 or 2");
}

// Calls `row(i)` for each of `t` rows of `F` elements, on threads.
template <typename Row>
void for_rows(int64_t t, int64_t F, const Row& row) {
  const int64_t grain = std::max<int64_t>(1, kElements / std::max<int64_t>(1, F));
  torch::stable::parallel_for(0, t, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) row(i);
  });
}

void gated_activation_(Tensor gate_tF, Tensor up_tF, int64_t kind) {
  for (const Tensor& each : {gate_tF, up_tF}) check(each, gate_tF, kind);
  const Kernels& kernels = kernels_of(gate_tF.scalar_type());
  const int64_t F = gate_tF.size(1), size = kernels.size;
  auto* gate = static_cast<char*>(gate_tF.mutable_data_ptr());
  const auto* up = static_cast<const char*>(up_tF.const_data_ptr());
  const int64_t gate_stride = gate_tF.stride(0) * size, up_stride = up_tF.stride(0) * size;
  for_rows(gate_tF.size(0), F, [&](int64_t i) { kernels.activate(gate + i * gate_stride, up + i * up_stride, F, kind); });
}

void gated_gradients_(Tensor gate_tF, Tensor up_tF, Tensor grad_tF, int64_t kind) {
  for (const Tensor& each : {gate_tF, up_tF, grad_tF}) check(each, gate_tF, kind);
  const Kernels& kernels = kernels_of(gate_tF.scalar_type());
  const int64_t F = gate_tF.size(1), size = kernels.size;
  auto* gate = static_cast<char*>(gate_tF.mutable_data_ptr());
  auto* up = static_cast<char*>(up_tF.mutable_data_ptr());
  auto* grad = static_cast<char*>(grad_tF.mutable_data_ptr());
  const int64_t gate_stride = gate_tF.stride(0) * size, up_stride = up_tF.stride(0) * size;
  const int64_t grad_stride = grad_tF.stride(0) * size;
  for_rows(gate_tF.size(0), F, [&](int64_t i) {
    kernels.differentiate(gate + i * gate_stride, up + i * up_stride, grad + i * grad_stride, F, kind);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deepspeed_alst, CPU, library) {
  library.impl("gated_activation_", TORCH_BOX(&gated_activation_));
  library.impl("gated_gradients_", TORCH_BOX(&gated_gradients_));
}
